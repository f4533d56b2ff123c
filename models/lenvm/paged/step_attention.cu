// Attention of a step for Hopper GPUs (sm_90a): candidates over their row's paged prefix, and each over itself.
//
// A block of threads owns up to 64 queries of one row and key head. Its three groups of 128 threads ("parts") take
// every third block of the prefix each: scores and mixed values by the matrix units straight from shared memory, a softmax
// that goes on from one pass of some blocks to the next (as FlashAttention has it), and in the end the parts together.
// The row's own tokens are one more block, the first of all, of which a query sees its own token alone.
//
// What makes it fast: two passes' blocks are asked for before the kernel in front is waited for, nothing is put together
// by way of memory, and the parts take their turns at the matrix units, so that one multiplies while another takes
// exponents.
//
// Macros: D numbers a head (64 or 128), G queries of a token share a key head, KV key heads, WIDTH tokens a row, AT_ONCE
// blocks a pass, NORM whether heads have norms. bfloat16, blocks of 32 tokens. The matrix units read lines of 64 numbers:
// a head of 128 is two panels.
// hopper.cuh, which comes before, holds all that is not C++; the tests have another one, which runs on a CPU.

constexpr int SIZE = 32, PARTS = 3, ROWS = 64, PANELS = D / 64;
constexpr int HEADS = G * KV, LINE = (HEADS + 2 * KV) * D;  // raw products of a token: queries, keys, values
constexpr int QUERIES = WIDTH * G;                          // of a row and key head
constexpr int GROUPS = (QUERIES + ROWS - 1) / ROWS;
constexpr int THREADS = PARTS * 128;
constexpr int BLOCK = SIZE * 128;        // bytes of a block's keys, or values, in a panel
constexpr int PANEL = AT_ONCE * BLOCK;
constexpr int HALF = PANELS * PANEL;     // a part's ring: keys of two passes side by side, then their values
constexpr int PART = 4 * HALF;
constexpr int QUERY_PANEL = ROWS * 128, QUERY_BYTES = PANELS * QUERY_PANEL;
constexpr int TEAM = D / 16;             // threads of a line of queries: each has eight numbers of each rotary half
constexpr int LINES = 16 / PANELS;       // of a block, by 128 threads at once
constexpr int PITCH = D + 8;            // of a part's sums, so that no two threads of a warp meet in a bank
constexpr float UNSEEN = -1e30f;        // finite: less another one it is a number
static_assert(ROWS * PITCH * 4 <= PART, "a part's sums lie where its ring was");

// Barriers by number: 0 everybody's, then one a part, then one a turn.
constexpr int PART_BARRIER = 1, TURN_BARRIER = PART_BARRIER + PARTS;

// Sixteen numbers of a head in packed pairs, eight of each rotary half: rotates them, after the head's RMSNorm (by this
// weight of theirs) where the model has one.
__device__ __forceinline__ void rotate(uint4& lo, uint4& hi, const float* cos, const float* sin, const uint4& weight_lo,
                                       const uint4& weight_hi, float eps) {
  u32 *a = (u32*)&lo, *b = (u32*)&hi;
  const u32 *u = (const u32*)&weight_lo, *v = (const u32*)&weight_hi;
  float factor = 0.f;
  if (NORM) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++)
      squares += low(a[i]) * low(a[i]) + high(a[i]) * high(a[i]) + low(b[i]) * low(b[i]) + high(b[i]) * high(b[i]);
#pragma unroll
    for (int by = 1; by < TEAM; by *= 2) squares += __shfl_xor_sync(~0u, squares, by);
    factor = rsqrtf(squares * (1.f / D) + eps);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float x0 = low(a[i]), x1 = high(a[i]), y0 = low(b[i]), y1 = high(b[i]);
    if (NORM) x0 *= factor * low(u[i]), x1 *= factor * high(u[i]), y0 *= factor * low(v[i]), y1 *= factor * high(v[i]);
    a[i] = pack(x0 * cos[2 * i] - y0 * sin[2 * i], x1 * cos[2 * i + 1] - y1 * sin[2 * i + 1]);
    b[i] = pack(y0 * cos[2 * i] + x0 * sin[2 * i], y1 * cos[2 * i + 1] + x1 * sin[2 * i + 1]);
  }
}

// Heads of 64: no more registers than leave room for a block of the product in front. Of 128 there is none, by its
// memory: all that so many threads can have.
extern "C" __global__ void __maxnreg__(D == 64 ? 144 : 168)
step_attention(const bf16* qkv, const bf16* __restrict__ pool_k, const bf16* __restrict__ pool_v,
               const int* __restrict__ tables, const int* __restrict__ lengths, bf16* __restrict__ out,
               const float* __restrict__ cosines, const float* __restrict__ sines, const bf16* __restrict__ norm_q,
               const bf16* __restrict__ norm_k, bf16* __restrict__ kept_k, bf16* __restrict__ kept_v, float scale,
               float eps, u64 stride_block, u64 stride_head, int columns) {
  DYNAMIC_SHARED(raw);
  __shared__ float2 stats[PARTS][ROWS];  // greatest score, sum of weights
  const u32 base = (shared_at(raw) + 1023) & ~1023u;
  unsigned char* shared = raw + (base - shared_at(raw));
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int part = warp >> 2, mine = threadIdx.x & 127;
  const int row = blockIdx.x / GROUPS, head = blockIdx.y, first = (blockIdx.x % GROUPS) * ROWS;
  const u32 ring = base + QUERY_BYTES + part * PART;

  const int length = lengths[row];
  const int blocks = (length + SIZE - 1) / SIZE;  // of the prefix: 1 .. blocks, after the row's own tokens
  const int passes = blocks + 1 > part ? ((blocks + PARTS - part) / PARTS + AT_ONCE - 1) / AT_ONCE : 0;

  const int* table = tables + row * columns - 1;
  const u64 from_mine = head * stride_head + mine * 8;
  const int line = mine / (8 * PANELS);
  const u32 to_mine = mine / 8 % PANELS * PANEL + line * 128 + (((mine & 7) ^ (line & 7)) * 16);
  auto find = [&](int pass, int* found) {
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) {
      const int index = part + PARTS * (pass * AT_ONCE + b);
      found[b] = 0 < index && index <= blocks ? table[index] : -1;
    }
  };
  auto load = [&](int pass, const int* found) {
#pragma unroll
    for (int b = 0; b < AT_ONCE; b++) {
      const u32 to = ring + (pass & 1) * HALF + b * BLOCK + to_mine;
      if (found[b] >= 0) {
        const u64 from = found[b] * stride_block + from_mine;
#pragma unroll
        for (int i = 0; i < SIZE / LINES; i++) {
          bring(to + i * LINES * 128, pool_k + from + i * 1024);
          bring(to + 2 * HALF + i * LINES * 128, pool_v + from + i * 1024);
        }
      } else if (part + pass + b > 0) {  // past the end: values of no weight, which must be finite
#pragma unroll
        for (int i = 0; i < SIZE / LINES; i++) put(to + 2 * HALF + i * LINES * 128, make_uint4(0, 0, 0, 0));
      }
    }
    close_group();
  };
  int found[2][AT_ONCE];
  find(0, found[0]);
  find(1, found[1]);
  load(0, found[0]);
  load(1, found[1]);

  const bool idle = first + (warp & 3) * 16 >= QUERIES;  // this warp's queries are none
  const int token0 = first / G;
  int own[2];  // of this thread's two queries: their tokens among the row's, less the thread's first key
#pragma unroll
  for (int i = 0; i < 2; i++) own[i] = (first + (warp & 3) * 16 + g + 8 * i) / G - token0 - c * 2;
  const int offset = threadIdx.x % TEAM * 8;  // of this thread's numbers in either rotary half
  float cos[8], sin[8];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u64 at = (u64)length * (D / 2) + offset + i * 4;
    *(uint4*)(cos + 4 * i) = fresh(cosines + at);
    *(uint4*)(sin + 4 * i) = fresh(sines + at);
  }
  uint4 norm_lo{}, norm_hi{};
  if (NORM) {
    const bf16* at = (threadIdx.x < 256 ? norm_q : norm_k) + offset;
    norm_lo = fresh(at);
    norm_hi = fresh(at + D / 2);
  }

  // Above nothing was read that the kernels in front write: see layer_kernels.py.
  await_kernel_in_front();
  let_next_come();

  // Queries by the first two groups of threads, the row's own keys and values by the third; a team a line.
#pragma unroll
  for (int round = 0; round < PANELS; round++) {
    const int which = (threadIdx.x & 255) / TEAM + round * (threadIdx.x < 256 ? 256 : 128) / TEAM;
    const u32 first_half = which * 128 + ((offset / 8 ^ (which & 7)) * 16);
    uint4 lo, hi;
    if (threadIdx.x < 256) {
      const int m = first + which, safe = m < QUERIES ? m : 0;
      const bf16* at = qkv + (u64)(row * WIDTH + safe / G) * LINE + (head * G + safe % G) * D + offset;
      lo = fresh(at);
      hi = fresh(at + D / 2);
      rotate(lo, hi, cos, sin, norm_lo, norm_hi, eps);
      put(base + first_half, lo);
      put(base + (PANELS == 1 ? first_half ^ 64 : first_half + QUERY_PANEL), hi);
    } else {
      const int token = token0 + which;
      const bool real = token < WIDTH;
      const bf16* at = qkv + (u64)(row * WIDTH + (real ? token : 0)) * LINE + (HEADS + head) * D + offset;
      lo = fresh(at);
      hi = fresh(at + D / 2);
      const uint4 v_lo = fresh(at + KV * D), v_hi = fresh(at + KV * D + D / 2);
      rotate(lo, hi, cos, sin, norm_lo, norm_hi, eps);
      const u32 to = base + QUERY_BYTES;  // the first block of part 0
      const u32 second_half = PANELS == 1 ? first_half ^ 64 : first_half + PANEL;
      put(to + first_half, lo);
      put(to + second_half, hi);
      put(to + 2 * HALF + first_half, v_lo);
      put(to + 2 * HALF + second_half, v_hi);
      if (real) {
        // Candidates are kept: the one that is chosen is not computed again.
        const u64 kept = ((u64)(row * WIDTH + token) * KV + head) * D + offset;
        *(uint4*)(kept_k + kept) = lo;
        *(uint4*)(kept_k + kept + D / 2) = hi;
        *(uint4*)(kept_v + kept) = v_lo;
        *(uint4*)(kept_v + kept + D / 2) = v_hi;
      }
    }
  }
  show();
  __syncthreads();

  float acc[32 * PANELS] = {};
  float peak[2] = {UNSEEN, UNSEEN}, total[2] = {0.f, 0.f};
  const u64 queries = matrix(base);
  if (passes == 0) {
    if (part > 0) meet(TURN_BARRIER + part, 256);
    if (part < PARTS - 1) leave(TURN_BARRIER + part + 1, 256);
  }
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
    await_groups_but_one();
    show();
    meet(PART_BARRIER + part, 128);
    const u32 here = ring + (pass & 1) * HALF;
    const u64 keys = matrix(here), values = matrix(here + 2 * HALF);
    if (pass + 2 < passes) find(pass + 2, found[0]);
    float s[16 * AT_ONCE];
    if (pass == 0 && part > 0) meet(TURN_BARRIER + part, 256);
    matrices_begin();
    scores_begin(s, queries, keys);
#pragma unroll
    for (int k = 1; k < 4 * PANELS; k++)
      scores(s, queries + k / 4 * (QUERY_PANEL / 16) + k % 4 * 2, keys + k / 4 * (PANEL / 16) + k % 4 * 2);
    matrices_done();
    hold(s);
    if (pass == 0 && part < PARTS - 1) leave(TURN_BARRIER + part + 1, 256);
    const int index0 = part + PARTS * pass * AT_ONCE;
    u32 p[2 * AT_ONCE][4];
    if (!idle) {
#pragma unroll
      for (int b = 0; b < AT_ONCE; b++) {
        const int index = index0 + PARTS * b, left = length - (index - 1) * SIZE;
        if (index == 0 || left < SIZE) {
#pragma unroll
          for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int key = n * 8 + (i & 1);
              // The tree mask's diagonal: each of the row's tokens sees itself and none of the others.
              const bool seen = index == 0 ? key == own[i / 2] : key + c * 2 < left;
              if (!seen) s[b * 16 + n * 4 + i] = UNSEEN;
            }
        }
      }
      float top[2], shift[2], shrink[2], sum[2][2] = {};
      {
        float most[2][2] = {{peak[0], s[1]}, {peak[1], s[3]}};
#pragma unroll
        for (int n = 0; n < 4 * AT_ONCE; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) most[i / 2][i % 2] = fmaxf(most[i / 2][i % 2], s[n * 4 + i]);
#pragma unroll
        for (int i = 0; i < 2; i++) top[i] = fmaxf(most[i][0], most[i][1]);
      }
#pragma unroll
      for (int by = 1; by < 4; by *= 2)
#pragma unroll
        for (int i = 0; i < 2; i++) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], by));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        shift[i] = top[i] * scale;
        shrink[i] = exp2_(peak[i] * scale - shift[i]);
        peak[i] = top[i];
      }
#pragma unroll
      for (int n = 0; n < 4 * AT_ONCE; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float x = exp2_(s[n * 4 + 2 * i] * scale - shift[i]);
          const float y = exp2_(s[n * 4 + 2 * i + 1] * scale - shift[i]);
          sum[i][0] += x, sum[i][1] += y;
          p[n / 2][(n % 2) * 2 + i] = pack(x, y);
        }
#pragma unroll
      for (int i = 0; i < 2; i++) total[i] = total[i] * shrink[i] + sum[i][0] + sum[i][1];
      if (pass > 0) {
#pragma unroll
        for (int t = 0; t < 32 * PANELS; t++) acc[t] *= shrink[(t >> 1) & 1];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8 * AT_ONCE; i++) p[i / 4][i % 4] = 0;
    }
    hold(acc);
    matrices_begin();
#pragma unroll
    for (int k = 0; k < 2 * AT_ONCE; k++)
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++) mix(acc + 32 * panel, p[k], values + panel * (PANEL / 16) + 128 * k);
    matrices_done();
    if (pass + 2 < passes) {
      meet(PART_BARRIER + part, 128);  // all of the part are done with what comes to lie here
      load(pass + 2, found[0]);
    } else {
      close_group();
    }
  }
  hold(acc);

  // The parts together, by way of their rings.
  meet(PART_BARRIER + part, 128);
  float* there = (float*)(shared + QUERY_BYTES + part * PART);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = (warp & 3) * 16 + g + 8 * i;
    total[i] += __shfl_xor_sync(~0u, total[i], 1);
    total[i] += __shfl_xor_sync(~0u, total[i], 2);
    if (c == 0) stats[part][at] = make_float2(peak[i] * scale, total[i]);
#pragma unroll
    for (int t = 0; t < 8 * PANELS; t++)
      *(float2*)(there + at * PITCH + t * 8 + c * 2) = make_float2(acc[t * 4 + 2 * i], acc[t * 4 + 2 * i + 1]);
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < (QUERIES < ROWS ? QUERIES : ROWS) * (D / 8); item += THREADS) {
    const int at = item / (D / 8), piece = item % (D / 8), m = first + at;
    float top = stats[0][at].x, weight[PARTS], sum = 0.f;
#pragma unroll
    for (int i = 1; i < PARTS; i++) top = fmaxf(top, stats[i][at].x);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      weight[i] = exp2_(stats[i][at].x - top);
      sum += weight[i] * stats[i][at].y;
    }
    const float by = __fdividef(1.f, sum);
    if (m < QUERIES) {
      bf16* to = out + ((u64)(row * WIDTH + m / G) * HEADS + head * G + m % G) * D + piece * 4;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float* sums = (const float*)(shared + QUERY_BYTES) + at * PITCH + half * (D / 2) + piece * 4;
        float4 mean = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
          const float4 x = *(const float4*)(sums + i * (PART / 4));
          mean.x += weight[i] * x.x, mean.y += weight[i] * x.y, mean.z += weight[i] * x.z, mean.w += weight[i] * x.w;
        }
        *(uint2*)(to + half * (D / 2)) = make_uint2(pack(mean.x * by, mean.y * by), pack(mean.z * by, mean.w * by));
      }
    }
  }
}
