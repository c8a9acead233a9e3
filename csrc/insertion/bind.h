// Python's view of the insertion: addresses of contiguous arrays, checked by pyrewrite/ops/insertion.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "insertion/params.h"

namespace pyrewrite {

using InsertionSizesList = std::array<int, 5>;              // channels, rank, taps, first step, steps
using InsertionShape = std::tuple<int, int, bool>;          // kernel height, kernel width, flipped
using InsertionAddresses = std::array<std::uintptr_t, 11>;  // base, keys, goal, noise, weight, bias, energy, cross,
                                                            // gram, penalty scale, penalty matrix (0: null)
using InsertionState = std::array<std::uintptr_t, 4>;       // lambda, exp_avg, exp_avg_sq, losses
using InsertionNumbers = std::array<double, 6>;             // slope, gain, lr, beta1, beta2, eps

// One edit, and the lists that its parameters point to.
struct InsertionEdit {
  InsertionParams params;
  std::vector<std::int64_t> starts;  // B + 1
  std::vector<int> shapes;           // height and width of each target
};

inline InsertionEdit insertion_edit(const InsertionSizesList& sizes, std::vector<std::int64_t> starts,
                                    const InsertionShape& shape, std::vector<int> shapes,
                                    const InsertionAddresses& problem, const InsertionState& state,
                                    const InsertionNumbers& settings) {
  if (starts.size() < 2) throw pybind11::value_error("insertion: no targets");
  if (shapes.size() != 2 * (starts.size() - 1)) throw pybind11::value_error("insertion: a shape for each target");
  const auto in = [&](int i) { return reinterpret_cast<const float*>(problem[i]); };
  const auto out = [&](int i) { return reinterpret_cast<float*>(state[i]); };
  InsertionParams p{};
  p.channels = sizes[0];
  p.rank = sizes[1];
  p.taps = sizes[2];
  p.first = sizes[3];
  p.count = sizes[4];
  p.targets = static_cast<int>(starts.size()) - 1;
  p.pixels = starts.back();
  std::tie(p.kernel_height, p.kernel_width, p.flipped) = shape;
  p.base = in(0);
  p.keys = in(1);
  p.goal = in(2);
  p.noise = in(3);
  p.weight = in(4);
  p.bias = in(5);
  p.energy = in(6);
  p.cross = in(7);
  p.gram = in(8);
  p.penalty_scale = in(9);
  p.penalty_matrix = in(10);
  p.lambda = out(0);
  p.exp_avg = out(1);
  p.exp_avg_sq = out(2);
  p.losses = reinterpret_cast<double*>(state[3]);
  p.negative_slope = static_cast<float>(settings[0]);
  p.gain = static_cast<float>(settings[1]);
  p.lr = settings[2];
  p.beta1 = settings[3];
  p.beta2 = settings[4];
  p.eps = settings[5];
  return {p, std::move(starts), std::move(shapes)};
}

// Good as long as `edits` is neither changed nor gone.
inline std::vector<InsertionParams> insertion_params(const std::vector<InsertionEdit>& edits) {
  std::vector<InsertionParams> all;
  for (const InsertionEdit& edit : edits) {
    all.push_back(edit.params);
    all.back().starts = edit.starts.data();
    all.back().shapes = edit.shapes.data();
  }
  return all;
}

// Runs a kernel without the global lock and raises what it reports.
template <class Kernel>
void run_insertion(Kernel kernel) {
  Status status;
  {
    pybind11::gil_scoped_release released;
    status = kernel();
  }
  if (status.ok()) return;
  if (status.kind == Status::kInvalid) throw pybind11::value_error(status.message);
  throw std::runtime_error(status.message);
}

inline void bind_insertion(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<InsertionEdit>(m, "InsertionEdit")
      .def(py::init(&insertion_edit), py::arg("sizes"), py::arg("starts"), py::arg("shape"), py::arg("shapes"),
           py::arg("problem"), py::arg("state"), py::arg("settings"));
  m.def(
      "insertion_steps_cpu",
      [](const std::vector<InsertionEdit>& edits, int threads) {
        const std::vector<InsertionParams> all = insertion_params(edits);
        run_insertion([&] {
          Status status;
          for (const InsertionParams& p : all)
            if (status.ok()) status = insertion_cpu(p, threads);
          return status;
        });
      },
      py::arg("edits"), py::arg("threads"));
#ifdef PYREWRITE_HAS_CUDA
  m.def(
      "insertion_workspace",
      [](const std::vector<InsertionEdit>& edits, int device) {
        const std::vector<InsertionParams> all = insertion_params(edits);
        std::size_t bytes = 0;
        run_insertion([&] { return insertion_workspace(all.data(), static_cast<int>(all.size()), device, &bytes); });
        return bytes;
      },
      py::arg("edits"), py::arg("device"));
  m.def(
      "insertion_steps_cuda",
      [](const std::vector<InsertionEdit>& edits, std::uintptr_t workspace, int device, std::uintptr_t stream,
         bool wait) {
        const std::vector<InsertionParams> all = insertion_params(edits);
        run_insertion([&] {
          return insertion_cuda(all.data(), static_cast<int>(all.size()), reinterpret_cast<void*>(workspace), device,
                                stream, wait);
        });
      },
      py::arg("edits"), py::arg("workspace"), py::arg("device"), py::arg("stream"), py::arg("wait"));
#endif
}

}  // namespace pyrewrite
