// The insertion on a GPU: checks, the choice of the regime, scratch memory, and the losses' last sum.
#include <cstddef>
#include <cstring>
#include <vector>

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
__global__ void loss_kernel(const __grid_constant__ InsertionProblem p, int rows) {
  const InsertionArrays& edit = p.edits[blockIdx.y];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= p.count) return;
  double sum = 0;
  for (int row = 0; row < rows; ++row) sum += edit.block_losses[std::int64_t(row) * p.count + i];
  edit.losses[i] = sum;
}

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

InsertionArrays arrays_of(const InsertionParams& p) {
  return {p.base,          p.keys,           p.goal,   p.noise,   p.weight,     p.bias,   p.energy, p.cross, p.gram,
          p.penalty_scale, p.penalty_matrix, p.lambda, p.exp_avg, p.exp_avg_sq, p.losses, nullptr,  nullptr};
}

// The problem without edits.
InsertionProblem problem_of(const InsertionParams& p) {
  InsertionProblem q{};
  q.channels = p.channels;
  q.rank = p.rank;
  q.taps = p.taps;
  q.targets = p.targets;
  q.pixels = static_cast<int>(p.pixels);
  q.kernel_height = p.kernel_height;
  q.kernel_width = p.kernel_width;
  q.flipped = p.flipped;
  q.demodulate = p.energy != nullptr;
  q.up = p.gain;
  q.down = p.gain * p.negative_slope;
  for (int b = 0; b < p.targets; ++b) {
    q.starts[b] = static_cast<int>(p.starts[b]);
    q.heights[b] = p.shapes[2 * b];
    q.widths[b] = p.shapes[2 * b + 1];
  }
  q.starts[p.targets] = q.pixels;
  q.count = p.count;
  q.first = p.first;
  return q;
}

bool same_shape(const InsertionProblem& p, const InsertionProblem& q) {
  return std::memcmp(&p, &q, offsetof(InsertionProblem, count)) == 0;
}

cudaError_t describe(int device, InsertionDevice* found) {
  Code code;
  cudaError_t error = code_here(&code);
  found->clusters = code.architecture >= 90;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error;
}

struct Choice {
  InsertionPlan plan;
  cudaError_t (*launch)(const InsertionProblem&, const InsertionPlan&, int edits, cudaStream_t);
};

// The rule: where the GPU has clusters, the kernel for one direction on a larger target where it takes the problem;
// else that for one small target with few directions; else that of clusters for the rest; else the general one. It
// looks at the shape of an edit and its activation alone.
Choice choose(const InsertionProblem& p, const InsertionDevice& device) {
  InsertionPlan plan = plan_unfolded(p, device);
  if (plan.blocks > 0) return {plan, launch_unfolded};
  plan = plan_resident(p, device);
  if (plan.blocks > 0) return {plan, launch_resident};
  plan = plan_cluster(p, device);
  if (plan.blocks > 0) return {plan, launch_cluster};
  return {plan_general(p, device), launch_general};
}

// One launch: edits of one shape.
struct Group {
  InsertionProblem problem;
  Choice choice;
  int edits = 0;

  std::size_t loss_bytes() const { return sizeof(double) * choice.plan.loss_rows * problem.count; }
  std::size_t scratch_bytes() const { return aligned(sizeof(float) * choice.plan.scratch_floats); }
  // Groups follow one another on the stream, so they share their scratch.
  std::size_t bytes() const { return edits * scratch_bytes() + aligned(edits * loss_bytes()); }
  static std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

  void place(char* scratch) {
    for (int n = 0; n < edits; ++n) {
      problem.edits[n].scratch = reinterpret_cast<float*>(scratch + n * scratch_bytes());
      problem.edits[n].block_losses = reinterpret_cast<double*>(scratch + edits * scratch_bytes() + n * loss_bytes());
    }
  }
};

std::size_t schedule_bytes(const InsertionParams& p) { return Group::aligned(sizeof(AdamStep) * p.count); }

// Checks the edits and sorts them into launches. device: the current one.
Status make_groups(const InsertionParams* edits, int count, int device, std::vector<Group>* groups) {
  InsertionDevice found{};
  const cudaError_t error = describe(device, &found);
  if (error != cudaSuccess) return cuda_status(error, "asking for the device's sizes", device);
  for (int n = 0; n < count; ++n) {
    const InsertionParams& p = edits[n];
    const Status checked = check(p);
    if (!checked.ok()) return checked;
    if (p.first != edits[0].first || p.count != edits[0].count || p.lr != edits[0].lr || p.beta1 != edits[0].beta1 ||
        p.beta2 != edits[0].beta2 || p.eps != edits[0].eps)
      return Status::error(Status::kInvalid, "insertion: edit %d has other steps or settings of Adam than edit 0", n);
    const InsertionProblem problem = problem_of(p);
    Group* group = nullptr;
    for (Group& one : *groups)
      if (one.edits < kMostEdits && same_shape(one.problem, problem)) group = &one;
    if (group == nullptr) {
      groups->push_back({problem, choose(problem, found)});
      group = &groups->back();
    }
    if (group->choice.plan.blocks == 0)
      return Status::error(Status::kUnsupported,
                           "insertion: rank %d with %d taps needs more shared memory than the %d bytes of GPU %d; "
                           "impl='torch' takes it",
                           p.rank, p.taps, found.shared_bytes, device);
    group->problem.edits[group->edits++] = arrays_of(p);
  }
  return {};
}

cudaError_t launch(const Group& group, cudaStream_t stream) {
  const cudaError_t error = group.choice.launch(group.problem, group.choice.plan, group.edits, stream);
  if (error != cudaSuccess) return error;
  const dim3 blocks((group.problem.count + kThreads - 1) / kThreads, group.edits);
  loss_kernel<<<blocks, kThreads, 0, stream>>>(group.problem, group.choice.plan.loss_rows);
  return cudaGetLastError();
}

}  // namespace

Status insertion_workspace(const InsertionParams* edits, int count, int device, std::size_t* bytes) {
  *bytes = 0;
  const DeviceGuard guard(device);  // which kernels are built and have room is asked of the current device
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  std::vector<Group> groups;
  const Status status = make_groups(edits, count, device, &groups);
  if (!status.ok() || groups.empty()) return status;
  for (const Group& group : groups)
    if (group.bytes() > *bytes) *bytes = group.bytes();
  *bytes += schedule_bytes(edits[0]);
  return {};
}

Status insertion_cuda(const InsertionParams* edits, int count, void* workspace, int device,
                      std::uintptr_t stream_handle, bool wait) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cuda_status(guard.error(), "choosing the device", device);
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_handle);
  std::vector<Group> groups;
  // Everything is checked before the first launch, so that a refusal leaves all edits as they were.
  const Status status = make_groups(edits, count, device, &groups);
  if (!status.ok() || groups.empty() || edits[0].count <= 0) return status;
  const InsertionParams& all = edits[0];
  AdamStep* schedule = static_cast<AdamStep*>(workspace);
  schedule_kernel<<<(all.count + kThreads - 1) / kThreads, kThreads, 0, stream>>>(all.lr, all.beta1, all.beta2, all.eps,
                                                                                  all.first, all.count, schedule);
  cudaError_t error = cudaGetLastError();
  for (Group& group : groups) {
    if (error != cudaSuccess) break;
    group.problem.schedule = schedule;
    group.place(static_cast<char*>(workspace) + schedule_bytes(all));
    error = launch(group, stream);
  }
  const Status launched = cuda_status(error, "insertion", device);
  return wait ? waited_for(launched, stream, "insertion", device) : launched;
}

}  // namespace pyrewrite
