// The instructions of compute capability 9.0a: barriers in shared memory, copies of boxes, matrix products of a group
// of four warps. Only code for that architecture may call them.
#pragma once

#include <cuda.h>

#include "second_moment/ptx.cuh"

namespace pyrewrite::sm90 {

__device__ __forceinline__ int block_of_cluster() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of all blocks; what was written before is seen after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// The same place in the shared memory of another block.
__device__ __forceinline__ std::uint32_t in_block(std::uint32_t address, int block) {
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Barriers of any block, addresses from in_block.
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// What this thread wrote to this block's shared memory is seen by matrix products that begin after a barrier. (The same
// for the memory of the whole cluster would be a fence of the GPU.)
__device__ __forceinline__ void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ float2 load_two(std::uint32_t from) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(from) : "memory");
  return value;
}
__device__ __forceinline__ float4 load_four(std::uint32_t from) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(from)
               : "memory");
  return value;
}
__device__ __forceinline__ void store_pair(std::uint32_t to, std::uint32_t first, std::uint32_t second) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}

// A box of the map, from its coordinates on, to the same place of all `blocks`; each one's barrier counts its bytes.
__device__ __forceinline__ void copy_box(std::uint32_t to, const CUtensorMap* map, int inner, int middle, int image,
                                         std::uint32_t barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(inner), "r"(middle), "r"(image), "r"(barrier), "h"(static_cast<unsigned short>(blocks))
      : "memory");
}
__device__ __forceinline__ void copy_box(std::uint32_t to, const CUtensorMap* map, int inner, int middle, int image,
                                         std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(inner), "r"(middle), "r"(image), "r"(barrier)
      : "memory");
}

// Registers of a thread, from here on; for whole groups of four warps.
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// An operand of a matrix product: lines of kLineBytes in groups of eight, their granules turned by the number of the
// 128 bytes that they lie in. Where channels lie side by side (lines of 128) the next 64 of them are a unit further.
template <int kLineBytes>
__device__ __forceinline__ std::uint64_t operand(std::uint32_t address, int next_unit) {
  static_assert(kLineBytes == 128 || kLineBytes == 64, "lines");
  return (std::uint64_t{kLineBytes == 128 ? 1 : 2} << 62) | (std::uint64_t{8 * kLineBytes / 16} << 32) |
         (static_cast<std::uint64_t>(next_unit / 16) << 16) | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All groups but the newest `kLeft` are done.
template <int kLeft>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Sums may be read only after the wait above, which the compiler cannot know: they pass through here.
template <int kCount>
__device__ __forceinline__ void settle(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums (+)= a b over 16 rows, 64 x 128 or 64 x 64; sums are begun anew where `add` is 0. kByRow: channels lie side by
// side in both operands.
#define PYREWRITE_F4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define PYREWRITE_F16(i) PYREWRITE_F4(i), PYREWRITE_F4(i + 4), PYREWRITE_F4(i + 8), PYREWRITE_F4(i + 12)
#define PYREWRITE_32                                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21," \
  " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYREWRITE_64                                                                                      \
  PYREWRITE_32                                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51," \
  " %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PYREWRITE_WGMMA(kind, name)                                                                              \
  template <bool kByRow>                                                                                         \
  __device__ __forceinline__ void multiply(kind, float (&sums)[64], std::uint64_t a, std::uint64_t b, int add) { \
    asm volatile(                                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" PYREWRITE_64                           \
        "}, %64, %65, p, 1, 1,"                                                                                  \
        " %67, %67;\n}"                                                                                          \
        : PYREWRITE_F16(0), PYREWRITE_F16(16), PYREWRITE_F16(32), PYREWRITE_F16(48)                              \
        : "l"(a), "l"(b), "r"(add), "n"(kByRow ? 1 : 0));                                                        \
  }                                                                                                              \
  template <bool kByRow>                                                                                         \
  __device__ __forceinline__ void multiply(kind, float (&sums)[32], std::uint64_t a, std::uint64_t b, int add) { \
    asm volatile(                                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" PYREWRITE_32                            \
        "}, %32, %33, p, 1, 1,"                                                                                  \
        " %35, %35;\n}"                                                                                          \
        : PYREWRITE_F16(0), PYREWRITE_F16(16)                                                                    \
        : "l"(a), "l"(b), "r"(add), "n"(kByRow ? 1 : 0));                                                        \
  }
PYREWRITE_WGMMA(Fp16, "f16")
PYREWRITE_WGMMA(Bf16, "bf16")
#undef PYREWRITE_WGMMA

// Likewise with `a` in registers: of a warp's 16 lines, line lane / 4 and the eighth after it at rows 2 * (lane % 4)
// and the next, then both at rows 8 further. They must not change before the products are done.
template <bool kByRow>
__device__ __forceinline__ void multiply(float (&sums)[64], const std::uint32_t (&a)[4], std::uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PYREWRITE_64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
      : PYREWRITE_F16(0), PYREWRITE_F16(16), PYREWRITE_F16(32), PYREWRITE_F16(48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kByRow ? 1 : 0));
}
template <bool kByRow>
__device__ __forceinline__ void multiply(float (&sums)[32], const std::uint32_t (&a)[4], std::uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PYREWRITE_32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
      : PYREWRITE_F16(0), PYREWRITE_F16(16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kByRow ? 1 : 0));
}
#undef PYREWRITE_64
#undef PYREWRITE_32
#undef PYREWRITE_F16
#undef PYREWRITE_F4

}  // namespace pyrewrite::sm90
