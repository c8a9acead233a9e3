// pyrewrite._C: the only file that knows Python. Kernels see raw pointers and plain structs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "common/device.h"
#include "common/status.h"
#include "convolution/bind.h"
#include "projection/params.h"
#include "second_moment/params.h"
#if __has_include("insertion/bind.h")
#include "insertion/bind.h"
#define PYREWRITE_HAS_INSERTION 1
#endif

namespace py = pybind11;

namespace pyrewrite {
namespace {

// Every function here takes addresses (`Tensor.data_ptr()`), sizes and strides in elements. The callers in
// pyrewrite/ops check them.
using Strides = std::array<std::int64_t, 4>;
using Place = std::pair<std::uintptr_t, Strides>;  // address, strides

void raise_if_failed(const Status& status) {
  if (status.ok()) return;
  if (status.kind == Status::kInvalid) throw py::value_error(status.message);
  throw std::runtime_error(status.message);
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// shape and strides: images, channels, height, width
SecondMomentParams moment_params(std::uintptr_t x, int dtype, const Strides& shape, const Strides& strides) {
  SecondMomentParams params{};
  params.x = pointer<const void>(x);
  params.dtype = static_cast<DType>(dtype);
  params.images = shape[0];
  params.d = static_cast<int>(shape[1]);
  params.height = shape[2];
  params.width = shape[3];
  params.image_stride = strides[0];
  params.channel_stride = strides[1];
  params.row_stride = strides[2];
  params.column_stride = strides[3];
  return params;
}

void second_moment(std::uintptr_t x, int dtype, const Strides& shape, const Strides& strides, std::uintptr_t total,
                   int threads) {
  const SecondMomentParams params = moment_params(x, dtype, shape, strides);
  Status status;
  {
    py::gil_scoped_release released;
    status = second_moment_cpu(params, pointer<double>(total), threads);
  }
  raise_if_failed(status);
}

WeightView view(const Place& place) {
  const Strides& strides = place.second;
  return {pointer<float>(place.first), strides[0], strides[1], strides[2], strides[3]};
}

// One weight of a batch: its shape (out, in, height, width), its tensors in the order weight, base[, grad, exp_avg,
// exp_avg_sq], its direction (address, strides) and rank.
struct Weight {
  std::array<int, 4> shape;
  std::vector<Place> places;
  std::pair<std::uintptr_t, std::array<std::int64_t, 2>> direction;
  int rank;
};

std::vector<ProjectionItem> items_of(const std::vector<Weight>& weights, bool adam) {
  std::vector<ProjectionItem> items;
  for (const Weight& weight : weights) {
    if (weight.places.size() != (adam ? 5u : 2u)) throw py::value_error("projection: wrong number of tensors");
    ProjectionItem item{};
    item.weight = view(weight.places[0]);
    item.base = view(weight.places[1]);
    if (adam) {
      item.grad = view(weight.places[2]);
      item.exp_avg = view(weight.places[3]);
      item.exp_avg_sq = view(weight.places[4]);
    }
    item.direction = pointer<const float>(weight.direction.first);
    item.direction_rank_stride = weight.direction.second[0];
    item.direction_in_stride = weight.direction.second[1];
    item.out = weight.shape[0];
    item.in = weight.shape[1];
    item.height = weight.shape[2];
    item.width = weight.shape[3];
    item.rank = weight.rank;
    items.push_back(item);
  }
  return items;
}

struct Adam {
  double step, lr, beta1, beta2, eps;
  bool project;
};

AdamSettings settings_of(const Adam* adam) {
  AdamSettings settings{};
  settings.project = adam == nullptr || adam->project;
  if (adam == nullptr) return settings;
  settings.enabled = 1;
  settings.step_size = static_cast<float>(adam->lr / (1.0 - std::pow(adam->beta1, adam->step)));
  settings.bias_correction2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(adam->beta2, adam->step)));
  settings.one_minus_beta1 = static_cast<float>(1.0 - adam->beta1);
  settings.beta2 = static_cast<float>(adam->beta2);
  settings.one_minus_beta2 = static_cast<float>(1.0 - adam->beta2);
  settings.eps = static_cast<float>(adam->eps);
  return settings;
}

void project_on_cpu(const std::vector<Weight>& weights, const Adam* adam, int threads) {
  const std::vector<ProjectionItem> items = items_of(weights, adam != nullptr);
  const AdamSettings settings = settings_of(adam);
  Status status;
  {
    py::gil_scoped_release released;
    status = project_cpu(items.data(), static_cast<int>(items.size()), settings, threads);
  }
  raise_if_failed(status);
}

#ifdef PYREWRITE_HAS_CUDA

std::size_t moment_workspace(std::uintptr_t x, int dtype, const Strides& shape, const Strides& strides, int precision,
                             int family, int device) {
  const SecondMomentParams params = moment_params(x, dtype, shape, strides);
  std::size_t bytes = 0;
  Status status;
  {
    py::gil_scoped_release released;
    status = second_moment_workspace(params, static_cast<Precision>(precision), static_cast<MomentFamily>(family),
                                     device, &bytes);
  }
  raise_if_failed(status);
  return bytes;
}

void moment_on_cuda(std::uintptr_t x, int dtype, const Strides& shape, const Strides& strides, int precision,
                    int family, std::uintptr_t moment, const std::array<std::int64_t, 2>& moment_strides,
                    std::uintptr_t workspace, int device, std::uintptr_t stream, bool wait) {
  const SecondMomentParams params = moment_params(x, dtype, shape, strides);
  const MomentView view{pointer<double>(moment), moment_strides[0], moment_strides[1]};
  Status status;
  {
    py::gil_scoped_release released;
    status = second_moment_cuda(params, static_cast<Precision>(precision), static_cast<MomentFamily>(family), view,
                                pointer<void>(workspace), device, stream, wait);
  }
  raise_if_failed(status);
}

void project_on_cuda(const std::vector<Weight>& weights, const Adam* adam, int device, std::uintptr_t stream,
                     bool wait) {
  const std::vector<ProjectionItem> items = items_of(weights, adam != nullptr);
  const AdamSettings settings = settings_of(adam);
  Status status;
  {
    py::gil_scoped_release released;
    status = project_cuda(items.data(), static_cast<int>(items.size()), settings, device, stream, wait);
  }
  raise_if_failed(status);
}

py::dict cuda_report_dict() {
  CudaReport report;
  {
    py::gil_scoped_release released;
    report = cuda_report();
  }
  py::list devices;
  for (const DeviceProperties& device : report.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    entry["shared_memory"] = device.shared_memory;
    entry["reads_host_memory"] = device.reads_host_memory;
    devices.append(entry);
  }
  py::dict result;
  result["driver"] = report.driver;
  result["runtime"] = report.runtime;
  result["error"] = report.error;
  result["message"] = report.message;
  result["devices"] = devices;
  return result;
}

#endif  // PYREWRITE_HAS_CUDA

py::dict build_info() {
  py::dict info;
  info["version"] = PYREWRITE_VERSION;
  info["compiler"] = PYREWRITE_COMPILER;
  info["processor"] = PYREWRITE_SYSTEM;
  info["instruction_sets"] = PYREWRITE_ISA_LIST;
#ifdef PYREWRITE_HAS_CUDA
  info["cuda"] = true;
  info["nvcc"] = PYREWRITE_NVCC;
  info["cuda_architectures"] = PYREWRITE_CUDA_ARCHITECTURES;
  info["cuda_runtime"] = PYREWRITE_CUDA_RUNTIME;
#else
  info["cuda"] = false;
#endif
  return info;
}

}  // namespace
}  // namespace pyrewrite

// Safe without the global lock: the module keeps no state of its own.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace pyrewrite;
  m.def("version", [] { return PYREWRITE_VERSION; });
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return isa_name(cpu_isa()); });
  m.def("second_moment", &second_moment, py::arg("x"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
        py::arg("total"), py::arg("threads"));

  py::class_<Weight>(m, "Weight")
      .def(py::init([](const std::array<int, 4>& shape, const std::vector<Place>& places,
                       const std::pair<std::uintptr_t, std::array<std::int64_t, 2>>& direction,
                       int rank) { return Weight{shape, places, direction, rank}; }),
           py::arg("shape"), py::arg("places"), py::arg("direction"), py::arg("rank"));
  py::class_<Adam>(m, "Adam").def(py::init([](double step, double lr, double beta1, double beta2, double eps,
                                              bool project) { return Adam{step, lr, beta1, beta2, eps, project}; }),
                                  py::arg("step"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
                                  py::arg("project"));
  m.def("project_cpu", &project_on_cpu, py::arg("weights"), py::arg("adam").none(true), py::arg("threads"));
#ifdef PYREWRITE_HAS_CUDA
  m.def(
      "second_moment_family",
      [](int major, int minor, bool sm90, int dtype, int precision) {
        return second_moment_family(major, minor, sm90, static_cast<DType>(dtype), static_cast<Precision>(precision));
      },
      py::arg("major"), py::arg("minor"), py::arg("sm90"), py::arg("dtype"), py::arg("precision"));
  m.def("second_moment_workspace", &moment_workspace, py::arg("x"), py::arg("dtype"), py::arg("shape"),
        py::arg("strides"), py::arg("precision"), py::arg("family"), py::arg("device"));
  m.def("second_moment_cuda", &moment_on_cuda, py::arg("x"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
        py::arg("precision"), py::arg("family"), py::arg("moment"), py::arg("moment_strides"), py::arg("workspace"),
        py::arg("device"), py::arg("stream"), py::arg("wait"));
  m.def("project_cuda", &project_on_cuda, py::arg("weights"), py::arg("adam").none(true), py::arg("device"),
        py::arg("stream"), py::arg("wait"));
  m.def("cuda_report", &cuda_report_dict);
#endif

  bind_convolution(m);
#ifdef PYREWRITE_HAS_INSERTION
  bind_insertion(m);
#endif
}
