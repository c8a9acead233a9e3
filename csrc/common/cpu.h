// Which instruction set the processor at hand has. Files named *.isa.cpp are compiled once for each.
#pragma once

namespace pyrewrite {

enum class Isa { baseline, avx2, avx512 };

// The best one that is both compiled in and supported here. The environment variable PYREWRITE_CPU_ISA (baseline, avx2,
// avx512) lowers it, for tests; it is read once.
Isa cpu_isa();
const char* isa_name(Isa isa);

}  // namespace pyrewrite

// In a dispatcher: PYREWRITE_DISPATCH(second_moment_rows)(arguments...) calls the variant for this processor. Each
// variant is a function of that name in the namespace pyrewrite::<isa>, declared with PYREWRITE_DECLARE_ISA(return
// type, name, parameter list).
#if defined(__x86_64__) || defined(_M_X64)
#define PYREWRITE_DECLARE_ISA(result, name, parameters) \
  namespace baseline {                                  \
  result name parameters;                               \
  }                                                     \
  namespace avx2 {                                      \
  result name parameters;                               \
  }                                                     \
  namespace avx512 {                                    \
  result name parameters;                               \
  }
#define PYREWRITE_DISPATCH(name)                                                  \
  (::pyrewrite::cpu_isa() == ::pyrewrite::Isa::avx512 ? ::pyrewrite::avx512::name \
   : ::pyrewrite::cpu_isa() == ::pyrewrite::Isa::avx2 ? ::pyrewrite::avx2::name   \
                                                      : ::pyrewrite::baseline::name)
#else
#define PYREWRITE_DECLARE_ISA(result, name, parameters) \
  namespace baseline {                                  \
  result name parameters;                               \
  }
#define PYREWRITE_DISPATCH(name) (::pyrewrite::baseline::name)
#endif
