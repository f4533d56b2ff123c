// What Hopper (sm_90a) has beyond C++, by name: for our kernels, and so that they can be run without it.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;  // as bits

#define DYNAMIC_SHARED(name) extern __shared__ unsigned char name[]

__device__ __forceinline__ u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float lo, float hi) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Sixteen bytes as they are now: neither before what stands above nor by the read-only path, which may take what a kernel
// in front has yet to write.
__device__ __forceinline__ uint4 fresh(const void* at) {
  uint4 x;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at)
               : "memory");
  return x;
}
__device__ __forceinline__ void put(u32 at, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void bring(u32 to, const bf16* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// What ordinary stores and asynchronous copies wrote is seen by the matrix units.
__device__ __forceinline__ void show() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void leave(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Matrices of 128-byte lines, eight by eight, whose 16-byte pieces are swizzled by their line's number.
__device__ __forceinline__ u64 matrix(u32 at) {
  return (u64)((at & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ void matrices_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void matrices_done() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// The compiler keeps a tile where it is until here.
template <int N>
__device__ __forceinline__ void hold(float (&tile)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(tile[i])::"memory");
}

__device__ __forceinline__ void await_groups_but_one() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
// Programmatic dependent launch.
__device__ __forceinline__ void await_kernel_in_front() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_come() { asm volatile("griddepcontrol.launch_dependents;"); }
