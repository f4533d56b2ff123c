// What hopper.cuh gives our CUDA kernels, on a CPU: a thread for each thread of a block, blocks one after another.
//
// What was asked for asynchronously arrives as late as it may, when its group is waited for, or as early (``eager``); what
// the kernel in front writes is not there before it is waited for; matrices are read from where their descriptor and
// swizzle say. Barriers that are missing are found by the compiler's thread sanitizer.

#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __maxnreg__(registers)
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::memory

namespace emulated {

constexpr int MOST_THREADS = 1024;
struct Index { int x, y, z; };
inline thread_local Index thread, block;

alignas(1024) inline unsigned char memory[256 << 10];
constexpr u32 BEGIN = 1024;  // shared memory's addresses: not 0, as on the GPU
inline u32 size;             // of what was asked for

// Barriers by number: bar.sync and bar.arrive.
struct Barrier {
  std::mutex mutex;
  std::condition_variable moved;
  int arrived = 0;
  long turn = 0;
  void arrive(int threads, bool wait) {
    std::unique_lock lock(mutex);
    const long mine = turn;
    if (++arrived == threads) {
      arrived = 0;
      turn++;
      moved.notify_all();
    } else if (wait) {
      moved.wait(lock, [&] { return turn != mine; });
    }
  }
};
inline Barrier barriers[16];
inline int threads_of_block;

// What threads of a warp hand each other.
struct Warp {
  std::barrier<> meet{32};
  u32 given[32][4];
};
inline Warp* warps;

struct Copy { u32 to; const void* from; };
inline thread_local std::vector<std::vector<Copy>> groups;
inline thread_local std::vector<Copy> open_group;
inline bool eager = false;

// What the kernel in front writes: nothing, until it was waited for.
inline const void *late_begin = nullptr, *late_end = nullptr;
inline thread_local bool waited;

inline unsigned char* at(u32 address) {
  if (address < BEGIN || address + 16 > BEGIN + size) std::abort();
  return memory + (address - BEGIN);
}

template <class Kernel>
void launch(int columns, int rows, int threads, u32 shared, Kernel kernel) {
  threads_of_block = threads;
  size = shared;
  std::vector<Warp> all(threads / 32);
  warps = all.data();
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < columns; x++) {
      std::memset(memory, 0xff, sizeof memory);  // what nobody wrote is NaN
      std::vector<std::thread> running;
      for (int i = 0; i < threads; i++)
        running.emplace_back([=] {
          thread = {i, 0, 0};
          block = {x, y, 0};
          waited = false;
          kernel();
          groups.clear();
          open_group.clear();
        });
      for (auto& one : running) one.join();
    }
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block

inline void __syncthreads() { emulated::barriers[0].arrive(emulated::threads_of_block, true); }
inline u32 shared_at(const void* p) { return emulated::BEGIN + (u32)((const unsigned char*)p - emulated::memory); }
inline float __uint_as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline u32 bits(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float low(u32 x) { return __uint_as_float(x << 16); }
inline float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
inline u32 rounded(float x) {
  const u32 y = bits(x);
  return std::isnan(x) ? 0x7fff : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}
inline u32 pack(float lo, float hi) { return rounded(lo) | rounded(hi) << 16; }
inline float exp2_(float x) { return std::exp2(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline uint4 fresh(const void* at) {
  if (!emulated::waited && emulated::late_begin <= at && at < emulated::late_end) return {~0u, ~0u, ~0u, ~0u};
  uint4 x;
  std::memcpy(&x, at, 16);
  return x;
}
inline void put(u32 to, const uint4& x) { std::memcpy(emulated::at(to), &x, 16); }
inline void bring(u32 to, const bf16* from) {
  if (emulated::eager) std::memcpy(emulated::at(to), from, 16);
  else emulated::open_group.push_back({to, from});
}
inline void close_group() {
  emulated::groups.push_back(std::move(emulated::open_group));
  emulated::open_group.clear();
}
inline void await_groups_but_one() {
  auto& groups = emulated::groups;
  while (groups.size() > 1) {
    for (const auto& copy : groups.front()) std::memcpy(emulated::at(copy.to), copy.from, 16);
    groups.erase(groups.begin());
  }
}
inline void show() {}
inline void meet(int barrier, int threads) { emulated::barriers[barrier].arrive(threads, true); }
inline void leave(int barrier, int threads) { emulated::barriers[barrier].arrive(threads, false); }
inline void await_kernel_in_front() { emulated::waited = true; }
inline void let_next_come() {}

inline u32 given_by(u32 mine, int lane) {
  auto& warp = emulated::warps[threadIdx.x / 32];
  warp.given[threadIdx.x % 32][0] = mine;
  warp.meet.arrive_and_wait();
  const u32 theirs = warp.given[lane][0];
  warp.meet.arrive_and_wait();
  return theirs;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __shfl_xor_sync(u32, float x, int by) {
  return __uint_as_float(given_by(bits(x), threadIdx.x % 32 ^ by));
}

// Matrices: 128-byte lines whose 16-byte pieces are swizzled by bits 7 to 9 of their address.
inline u64 matrix(u32 at) { return at >> 4; }
inline float element(u64 matrix, int line, int column) {
  const u32 linear = (u32)(matrix << 4) + line * 128 + column * 2;
  bf16 x;
  std::memcpy(&x, emulated::at(linear ^ (linear >> 7 & 7) << 4), 2);
  return low(x);
}
inline void matrices_begin() {}
inline void matrices_done() {}
template <int N>
inline void hold(float (&)[N]) {}

// Rows and columns of what a thread holds of a [64, N] tile.
inline int row_of(int i) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * (i >> 1 & 1); }
inline int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + (i & 1); }

inline void scores(float* d, u64 a, u64 b) {  // a [64, 16], b [keys of a pass, 16]: by lines both
  for (int i = 0; i < 16 * AT_ONCE; i++)
    for (int k = 0; k < 16; k++) d[i] += element(a, row_of(i), k) * element(b, column_of(i), k);
}
inline void scores_begin(float* d, u64 a, u64 b) {
  for (int i = 0; i < 16 * AT_ONCE; i++) d[i] = 0.f;
  scores(d, a, b);
}
inline void mix(float* d, const u32* a, u64 b) {  // a in registers, b [16, 64] by lines
  auto& warp = emulated::warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  std::memcpy(warp.given[lane], a, 16);
  warp.meet.arrive_and_wait();
  for (int i = 0; i < 32; i++)
    for (int k = 0; k < 16; k++) {
      const u32 pair = warp.given[lane / 4 * 4 + k % 8 / 2][(i >> 1 & 1) + k / 8 * 2];
      d[i] += (k & 1 ? high(pair) : low(pair)) * element(b, k, column_of(i));
    }
  warp.meet.arrive_and_wait();
}
