// The insertion on a GPU: checks, the choice of the regime, scratch memory, and the losses' last sum.
#include "insertion/kernels.h"

namespace pyrewrite {
namespace {

constexpr int kThreads = 128;

// The numbers of steps first + 1 ... first + count. Each depends on its step alone, so chunks of steps make no
// difference.
__global__ void schedule_kernel(double lr, double beta1, double beta2, double eps, int first, int count,
                                AdamStep* schedule) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const int step = first + i + 1;
  AdamStep a;
  a.rise1 = static_cast<float>(1 - beta1);
  a.keep2 = static_cast<float>(beta2);
  a.rise2 = static_cast<float>(1 - beta2);
  a.root_correction2 = static_cast<float>(sqrt(1 - pow(beta2, static_cast<double>(step))));
  a.eps = static_cast<float>(eps);
  a.rate = static_cast<float>(-lr / (1 - pow(beta1, static_cast<double>(step))));
  schedule[i] = a;
}

// losses[i] = the sum over the rows, in their order.
__global__ void loss_kernel(const double* block_losses, int rows, int count, double* losses) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  double sum = 0;
  for (int row = 0; row < rows; ++row) sum += block_losses[std::int64_t(row) * count + i];
  losses[i] = sum;
}

// Device memory that lives as long as the work on the stream needs it.
class Scratch {
 public:
  Scratch(std::size_t bytes, cudaStream_t stream) : stream_(stream) {
    error_ = cudaMallocAsync(&data_, bytes, stream);
    if (error_ != cudaSuccess) data_ = nullptr;
  }
  ~Scratch() {
    if (data_ != nullptr) (void)cudaFreeAsync(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }
  cudaError_t error() const { return error_; }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
  cudaError_t error_;
};

Status check(const InsertionParams& p) {
  if (p.channels <= 0 || p.rank <= 0 || p.taps <= 0 || p.targets <= 0 || p.pixels <= 0)
    return Status::error(Status::kInvalid,
                         "insertion: %d channels, rank %d, %d taps, %d targets, %lld pixels: none may be 0", p.channels,
                         p.rank, p.taps, p.targets, static_cast<long long>(p.pixels));
  if (p.targets > kMostTargets || p.pixels > (1 << 30))
    return Status::error(Status::kUnsupported,
                         "insertion: %d targets with %lld pixels; the CUDA kernel takes %d targets and 2^30 pixels, "
                         "impl='torch' takes more",
                         p.targets, static_cast<long long>(p.pixels), kMostTargets);
  if (p.starts[0] != 0 || p.starts[p.targets] != p.pixels || p.kernel_height * p.kernel_width != p.taps)
    return Status::error(Status::kInvalid,
                         "insertion: the targets do not cover the pixels 0 ... %lld, or %d taps are "
                         "no %d x %d kernel",
                         static_cast<long long>(p.pixels), p.taps, p.kernel_height, p.kernel_width);
  for (int b = 0; b < p.targets; ++b) {
    const std::int64_t size = p.starts[b + 1] - p.starts[b];
    if (size <= 0) return Status::error(Status::kInvalid, "insertion: target %d is empty", b);
    if (p.shapes[2 * b] <= 0 || size != std::int64_t(p.shapes[2 * b]) * p.shapes[2 * b + 1])
      return Status::error(Status::kInvalid, "insertion: target %d of %d x %d does not have %lld pixels", b,
                           p.shapes[2 * b], p.shapes[2 * b + 1], static_cast<long long>(size));
    if (p.shapes[2 * b] > kMostSide || p.shapes[2 * b + 1] > kMostSide)
      return Status::error(Status::kUnsupported,
                           "insertion: target %d is %d x %d; the CUDA kernel takes sides up to %d, impl='torch' larger "
                           "ones",
                           b, p.shapes[2 * b], p.shapes[2 * b + 1], kMostSide);
  }
  return {};
}

InsertionProblem problem_of(const InsertionParams& p) {
  InsertionProblem q{};
  q.channels = p.channels;
  q.rank = p.rank;
  q.taps = p.taps;
  q.targets = p.targets;
  q.pixels = static_cast<int>(p.pixels);
  q.count = p.count;
  q.kernel_height = p.kernel_height;
  q.kernel_width = p.kernel_width;
  q.flipped = p.flipped;
  for (int b = 0; b < p.targets; ++b) {
    q.starts[b] = static_cast<int>(p.starts[b]);
    q.heights[b] = p.shapes[2 * b];
    q.widths[b] = p.shapes[2 * b + 1];
  }
  q.starts[p.targets] = q.pixels;
  q.base = p.base;
  q.keys = p.keys;
  q.goal = p.goal;
  q.noise = p.noise;
  q.weight = p.weight;
  q.bias = p.bias;
  q.energy = p.energy;
  q.cross = p.cross;
  q.gram = p.gram;
  q.penalty_scale = p.penalty_scale;
  q.penalty_matrix = p.penalty_matrix;
  q.up = p.gain;
  q.down = p.gain * p.negative_slope;
  q.lambda = p.lambda;
  q.exp_avg = p.exp_avg;
  q.exp_avg_sq = p.exp_avg_sq;
  return q;
}

cudaError_t describe(int device, InsertionDevice* found) {
  cudaError_t error = cudaDeviceGetAttribute(&found->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error;
}

struct Choice {
  InsertionPlan plan;
  cudaError_t (*launch)(const InsertionProblem&, const InsertionPlan&, cudaStream_t);
};

// The rule: the kernel for one small target with few directions where it takes the problem; else that of clusters where
// the GPU has them and it takes the problem; else the general one.
Choice choose(const InsertionProblem& p, const InsertionDevice& device) {
  InsertionPlan plan = plan_resident(p, device);
  if (plan.blocks > 0) return {plan, launch_resident};
  plan = plan_cluster(p, device);
  if (plan.blocks > 0) return {plan, launch_cluster};
  return {plan_general(p, device), launch_general};
}

}  // namespace

Status insertion_cuda(const InsertionParams& params, int device, std::uintptr_t stream_handle, bool wait) {
  const Status checked = check(params);
  if (!checked.ok() || params.count <= 0) return checked;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  InsertionDevice found{};
  cudaError_t error = describe(device, &found);
  if (error != cudaSuccess) return cuda_status(error, "asking for the device's sizes", device);

  InsertionProblem p = problem_of(params);
  const Choice choice = choose(p, found);
  const InsertionPlan& plan = choice.plan;
  if (plan.blocks == 0)
    return Status::error(Status::kUnsupported,
                         "insertion: rank %d with %d taps needs more shared memory than the %d bytes of GPU %d; "
                         "impl='torch' takes it",
                         p.rank, p.taps, found.shared_bytes, device);
  const std::size_t loss_bytes = sizeof(double) * plan.loss_rows * p.count;
  const std::size_t own_bytes = sizeof(float) * plan.scratch_floats;
  const Scratch scratch(own_bytes + loss_bytes + sizeof(AdamStep) * p.count, stream);
  if (scratch.error() != cudaSuccess) return cuda_status(scratch.error(), "insertion's scratch memory", device);
  p.scratch = reinterpret_cast<float*>(scratch.data());
  p.segments = plan.segments;
  p.block_losses = reinterpret_cast<double*>(scratch.data() + own_bytes);
  AdamStep* schedule = reinterpret_cast<AdamStep*>(scratch.data() + own_bytes + loss_bytes);
  p.schedule = schedule;
  const int blocks = (p.count + kThreads - 1) / kThreads;
  schedule_kernel<<<blocks, kThreads, 0, stream>>>(params.lr, params.beta1, params.beta2, params.eps, params.first,
                                                   p.count, schedule);
  error = cudaGetLastError();
  if (error == cudaSuccess) error = choice.launch(p, plan, stream);
  if (error == cudaSuccess) {
    loss_kernel<<<blocks, kThreads, 0, stream>>>(p.block_losses, plan.loss_rows, p.count, params.losses);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess && wait) error = cudaStreamSynchronize(stream);
  return cuda_status(error, "insertion", device);
}

}  // namespace pyrewrite
