#include "common/cpu.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyrewrite {
namespace {

Isa detect() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
      best = Isa::avx512;
  }
  const char* wanted = std::getenv("PYREWRITE_CPU_ISA");
  if (wanted != nullptr) {
    for (Isa isa : {Isa::baseline, Isa::avx2})
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa < best) best = isa;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace pyrewrite
