// The element types on the GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyrewrite {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float4 widen4(const float* from) { return *reinterpret_cast<const float4*>(from); }
template <typename T>
__device__ __forceinline__ float4 widen4(const T* from) {  // 16 bit
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  const T* values = reinterpret_cast<const T*>(&bits);
  return {widen(values[0]), widen(values[1]), widen(values[2]), widen(values[3])};
}

}  // namespace pyrewrite
