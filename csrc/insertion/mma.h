// Matrix instructions on 16-bit halves. A number x is hi + lo, both halves of x * scale: 22 bits. A product of two such
// is hi hi + hi lo + lo hi, summed in float32.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace pyrewrite {
namespace {

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_two_matrices(unsigned (&r)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_two_matrices_transposed(unsigned (&r)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 8) b (8 x 8)
__device__ __forceinline__ void multiply_eight(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// acc += a b for Rows tiles of rows and Tiles of columns. b: hi in b[0], b[1], lo in b[2], b[3]. Whole: a has no lo.
// The small products first, and one kind after the other, so that a sum is not asked for right after it was begun.
template <bool Whole, int Tiles, int Rows>
__device__ __forceinline__ void multiply_tiles(float (*acc)[Rows][4], const unsigned (&hi)[Rows][4],
                                               const unsigned (&lo)[Rows][4], const unsigned (&b)[Tiles][4]) {
#pragma unroll
  for (int product = Whole ? 1 : 0; product < 3; ++product)
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
      for (int m = 0; m < Rows; ++m) {
        const int half = product == 1 ? 2 : 0;
        multiply(acc[tile][m], product == 0 ? lo[m] : hi[m], b[tile][half], b[tile][half + 1]);
      }
}

// The power of two that brings numbers up to `largest` below 2^14: halves then hold them to 22 bits.
__device__ __forceinline__ float half_scale(float largest) {
  const int exponent = largest > 0.f ? 13 - ((__float_as_int(largest) >> 23 & 255) - 127) : 0;
  return __int_as_float((min(max(exponent, -100), 100) + 127) << 23);
}

struct Split {
  __half hi, lo;
};

__device__ __forceinline__ Split split(float scaled) {
  const __half hi = __float2half_rn(scaled);
  return {hi, __float2half_rn(scaled - __half2float(hi))};
}

__device__ __forceinline__ unsigned pack(__half first, __half second) {
  return static_cast<unsigned>(__half_as_ushort(first)) | static_cast<unsigned>(__half_as_ushort(second)) << 16;
}

}  // namespace
}  // namespace pyrewrite
