// Short vectors for files named *.isa.cpp: as wide as the instruction set that the file is compiled for.
// No standard templates in such files: their out-of-line copies, compiled for a newer processor, could be the ones that
// the linker keeps for the whole program.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifndef PYREWRITE_ISA
#error "only for *.isa.cpp, which CMake compiles once per instruction set"
#endif

namespace pyrewrite {
namespace PYREWRITE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
// The same at any address.
typedef float VecAny __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const VecAny*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<VecAny*>(p) = v; }

// to[lane] += v[lane], in double
static inline void add(double* to, Vec v) {
  typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));
  typedef double WideAny __attribute__((vector_size(kLanes * sizeof(double)), aligned(8), may_alias));
  *reinterpret_cast<WideAny*>(to) += __builtin_convertvector(v, Wide);
}

static inline float sum(Vec v) {
  float total = 0.f;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

static inline float widen(float value) { return value; }

static inline float from_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float widen(BFloat16 value) { return from_bits(static_cast<std::uint32_t>(value.bits) << 16); }

static inline float widen(Half value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t rest = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  // Shifted into a float's fields the exponent is 112 too small; a product puts it right, for subnormal halves too.
  const float scaled = from_bits(rest) * 0x1p112f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &scaled, sizeof(bits));
  const std::uint32_t finite = sign | bits;
  const std::uint32_t special = sign | rest | 0x7f800000u;  // infinity and NaN
  return from_bits((value.bits & 0x7c00u) == 0x7c00u ? special : finite);
}

// to[k * to_stride + j] = from[j * from_stride + k] for j, k in 0 .. 3
template <typename T>
static inline void transpose_4x4(const T* from, std::int64_t from_stride, float* to, std::int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  typedef float FourAny __attribute__((vector_size(16), aligned(4), may_alias));
  Four row[4];
  for (int j = 0; j < 4; ++j)
    row[j] = Four{widen(from[j * from_stride]), widen(from[j * from_stride + 1]), widen(from[j * from_stride + 2]),
                  widen(from[j * from_stride + 3])};
  // Compilers make shuffles of these.
  for (int half = 0; half < 2; ++half) {
    const int k = 2 * half;
    const Four a = {row[0][k], row[1][k], row[0][k + 1], row[1][k + 1]};
    const Four b = {row[2][k], row[3][k], row[2][k + 1], row[3][k + 1]};
    *reinterpret_cast<FourAny*>(to + k * to_stride) = Four{a[0], a[1], b[0], b[1]};
    *reinterpret_cast<FourAny*>(to + (k + 1) * to_stride) = Four{a[2], a[3], b[2], b[3]};
  }
}

}  // namespace PYREWRITE_ISA
}  // namespace pyrewrite
