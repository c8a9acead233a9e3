// Python's view of the convolution: addresses of arrays, checked by pyrewrite/ops/convolution.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "convolution/params.h"

namespace pyrewrite {

// x, prepared weight, scale of the inputs, of the outputs, noise, bias (0: null), y
using ConvolutionArrays = std::array<std::uintptr_t, 7>;
using ConvolutionSizes = std::array<int, 5>;  // batch, height and width of the output, channels in and out

inline void bind_convolution(pybind11::module_& m) {
  namespace py = pybind11;
  m.attr("conv3x3_channels") = kConvChannels;
  m.def(
      "conv3x3_prepare",
      [](std::uintptr_t weight, const std::array<std::int64_t, 4>& strides, int out, int in, std::uintptr_t prepared) {
        py::gil_scoped_release released;
        conv3x3_prepare_cpu(reinterpret_cast<const float*>(weight), strides.data(), out, in,
                            reinterpret_cast<float*>(prepared));
      },
      py::arg("weight"), py::arg("strides"), py::arg("out"), py::arg("in_"), py::arg("prepared"));
  m.def(
      "conv3x3_cpu",
      [](const ConvolutionArrays& arrays, const ConvolutionSizes& sizes, bool upsample, double negative_slope,
         int threads) {
        const auto at = [&](int i) { return reinterpret_cast<float*>(arrays[i]); };
        const Conv3x3Params params{
            at(0),    at(1),    at(2),    at(3),    at(4),    at(5),    at(6),
            sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], upsample, static_cast<float>(negative_slope)};
        Status status;
        {
          py::gil_scoped_release released;
          status = conv3x3_cpu(params, threads);
        }
        if (!status.ok()) throw std::runtime_error(status.message);
      },
      py::arg("arrays"), py::arg("sizes"), py::arg("upsample"), py::arg("negative_slope"), py::arg("threads"));
}

}  // namespace pyrewrite
