// Element types that the kernels read. The numbers are those that pyrewrite/ops/_library.py passes.
#pragma once

#include <cstdint>

namespace pyrewrite {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

// Storage of the 16-bit types where the host has no arithmetic for them.
struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// Calls body(T{}) with the C++ type of `dtype`: `dispatch(dtype, [&](auto zero) { using T = decltype(zero); ... })`.
template <typename Body>
void dispatch(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::float16:
      return body(Half{});
    case DType::bfloat16:
      return body(BFloat16{});
  }
}

}  // namespace pyrewrite
