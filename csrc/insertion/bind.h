// Python's view of the insertion: addresses of contiguous arrays, checked by pyrewrite/ops/insertion.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "insertion/params.h"

namespace pyrewrite {

// sizes: channels, rank, taps, first step, steps. problem: base, keys, goal, noise, weight, bias, energy, cross, gram,
// penalty scale, penalty matrix (0: null). state: lambda, exp_avg, exp_avg_sq, losses. settings: slope, gain, lr,
// beta1, beta2, eps.
inline void insertion_steps_cpu(const std::array<int, 5>& sizes, const std::vector<std::int64_t>& starts,
                                const std::array<std::uintptr_t, 11>& problem,
                                const std::array<std::uintptr_t, 4>& state, const std::array<double, 6>& settings,
                                int threads) {
  if (starts.size() < 2) throw pybind11::value_error("insertion: no targets");
  const auto in = [&](int i) { return reinterpret_cast<const float*>(problem[i]); };
  const auto out = [&](int i) { return reinterpret_cast<float*>(state[i]); };
  InsertionParams p;
  p.channels = sizes[0];
  p.rank = sizes[1];
  p.taps = sizes[2];
  p.first = sizes[3];
  p.count = sizes[4];
  p.targets = static_cast<int>(starts.size()) - 1;
  p.pixels = starts.back();
  p.starts = starts.data();
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
  Status status;
  {
    pybind11::gil_scoped_release released;
    status = insertion_cpu(p, threads);
  }
  if (status.ok()) return;
  if (status.kind == Status::kInvalid) throw pybind11::value_error(status.message);
  throw std::runtime_error(status.message);
}

inline void bind_insertion(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("insertion_steps_cpu", &insertion_steps_cpu, py::arg("sizes"), py::arg("starts"), py::arg("problem"),
        py::arg("state"), py::arg("settings"), py::arg("threads"));
}

}  // namespace pyrewrite
