// Python's view of the convolution: addresses of arrays, checked by pyrewrite/ops/convolution.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "convolution/params.h"

namespace pyrewrite {

using ConvolutionSizes = std::array<int, 5>;  // batch, height and width, channels in and out
using ConvolutionFilter = std::array<float, 4>;

inline void bind_convolution(pybind11::module_& m) {
  namespace py = pybind11;
  const auto run = [](auto&& work) {
    Status status;
    {
      py::gil_scoped_release released;
      status = work();
    }
    if (!status.ok()) throw std::runtime_error(status.message);
  };
  const auto bind_prepare = [&](const char* name, auto* prepare) {
    m.def(
        name,
        [prepare, run](std::uintptr_t weight, int out, int in, std::uintptr_t prepared, int threads) {
          run([&] {
            return prepare(reinterpret_cast<const float*>(weight), out, in, reinterpret_cast<float*>(prepared),
                           threads);
          });
        },
        py::arg("weight"), py::arg("out"), py::arg("in_"), py::arg("prepared"), py::arg("threads"));
  };
  bind_prepare("conv3x3_prepare", &conv3x3_prepare_cpu);
  bind_prepare("upconv3x3_prepare", &upconv3x3_prepare_cpu);
  // arrays: x, weight, bias, y; sizes: batch, in, out
  m.def(
      "linear_cpu",
      [](const std::array<std::uintptr_t, 4>& arrays, const std::array<int, 3>& sizes, double scale, double rate) {
        const auto at = [&](int i) { return reinterpret_cast<float*>(arrays[i]); };
        const LinearParams params{at(0), at(1), at(2), at(3), sizes[0], sizes[1], sizes[2], scale, rate};
        py::gil_scoped_release released;
        linear_cpu(params);
      },
      py::arg("arrays"), py::arg("sizes"), py::arg("scale"), py::arg("rate"));
  // arrays: prepared weight, style, y; sizes: batch, channels in and out
  m.def(
      "demodulation_cpu",
      [run](const std::array<std::uintptr_t, 3>& arrays, const std::array<int, 3>& sizes, double scale, double epsilon,
            double gain) {
        const auto at = [&](int i) { return reinterpret_cast<float*>(arrays[i]); };
        const DemodulationParams params{at(0), at(1), at(2), sizes[0], sizes[1], sizes[2], scale, epsilon, gain};
        run([&] { return demodulation_cpu(params); });
      },
      py::arg("arrays"), py::arg("sizes"), py::arg("scale"), py::arg("epsilon"), py::arg("gain"));
  // arrays: x, matrix, bias, skip, filter (0: null), y; sizes: those of x, and the colours
  m.def(
      "colours_cpu",
      [run](const std::array<std::uintptr_t, 6>& arrays, const ConvolutionSizes& sizes, double clamp, int threads) {
        const auto at = [&](int i) { return reinterpret_cast<float*>(arrays[i]); };
        const auto [batch, height, width, in, channels] = sizes;
        const ColoursParams params{at(0), at(1),  at(2), at(3), at(4),    at(5),
                                   batch, height, width, in,    channels, static_cast<float>(clamp)};
        run([&] { return colours_cpu(params, threads); });
      },
      py::arg("arrays"), py::arg("sizes"), py::arg("clamp"), py::arg("threads"));
  // arrays: x, prepared weight, scale of the inputs, of the outputs, noise, bias (0: null), then y
  m.def(
      "conv3x3_cpu",
      [run](const std::array<std::uintptr_t, 7>& arrays, const ConvolutionSizes& sizes, bool upsample,
            double negative_slope, int threads) {
        const auto at = [&](int i) { return reinterpret_cast<float*>(arrays[i]); };
        const auto [batch, height, width, in, out] = sizes;
        const float slope = static_cast<float>(negative_slope);
        const Conv3x3Params params{at(0), at(1),  at(2), at(3), at(4), at(5),    at(6),
                                   batch, height, width, in,    out,   upsample, slope};
        run([&] { return conv3x3_cpu(params, threads); });
      },
      py::arg("arrays"), py::arg("sizes"), py::arg("upsample"), py::arg("negative_slope"), py::arg("threads"));
  // The same, but the map before the blur stands before y, and sizes are those of x.
  m.def(
      "upconv3x3_cpu",
      [run](const std::array<std::uintptr_t, 8>& arrays, const ConvolutionSizes& sizes, const ConvolutionFilter& v,
            const ConvolutionFilter& h, double negative_slope, int threads) {
        const auto at = [&](int i) { return reinterpret_cast<float*>(arrays[i]); };
        const auto [batch, height, width, in, out] = sizes;
        const UpConv3x3Params params{at(0),
                                     at(1),
                                     at(2),
                                     at(3),
                                     at(4),
                                     at(5),
                                     at(6),
                                     at(7),
                                     {v[0], v[1], v[2], v[3]},
                                     {h[0], h[1], h[2], h[3]},
                                     batch,
                                     height,
                                     width,
                                     in,
                                     out,
                                     static_cast<float>(negative_slope)};
        run([&] { return upconv3x3_cpu(params, threads); });
      },
      py::arg("arrays"), py::arg("sizes"), py::arg("vertical"), py::arg("horizontal"), py::arg("negative_slope"),
      py::arg("threads"));
}

}  // namespace pyrewrite
