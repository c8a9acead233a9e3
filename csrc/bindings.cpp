// pyrewrite._C: the only file that knows Python. Kernels see raw pointers and plain structs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if __has_include("insertion/bind.h")
#include "insertion/bind.h"
#define PYREWRITE_HAS_INSERTION 1
#endif

namespace py = pybind11;

// Safe without the global lock: the module keeps no state of its own.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.def("version", [] { return PYREWRITE_VERSION; });
#ifdef PYREWRITE_HAS_INSERTION
  pyrewrite::bind_insertion(m);
#endif
}
