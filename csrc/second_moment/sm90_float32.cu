// The Hopper kernels of float32 input: one file for each, to compile side by side.
#include "second_moment/sm90.cuh"

namespace pyrewrite {
namespace {

// The largest magnitude of each channel in about a thousand rows, runs of eight from everywhere. NaN is passed over.
constexpr int kRun = 8, kRuns = 128, kRunsOfBlock = 16;

template <bool kByRow>
__global__ void __launch_bounds__(256) peaks_kernel(const __grid_constant__ Source source, std::uint32_t* peaks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::uint32_t runs = (source.rows + kRun - 1) / kRun, step = runs > kRuns ? runs / kRuns : 1;
  const float* x = static_cast<const float*>(source.x);
  // Neighbouring lanes look at neighbouring memory: 32 channels of a row, or the eight rows of a run and four channels.
  const int channel = blockIdx.x * 32 + (kByRow ? lane : warp * 4 + lane / kRun);
  if (channel >= source.d) return;
  float peak = 0.f;
  for (int i = 0; i < kRunsOfBlock; ++i) {
    const std::uint32_t n = (blockIdx.y * kRunsOfBlock + i) * step * kRun + (kByRow ? warp : lane % kRun);
    if (n < source.rows) peak = fmaxf(peak, fabsf(x[source.offset(n) + channel * source.channel_stride]));
  }
  // The largest is the same in any order.
  if (peak > 0.f) atomicMax(peaks + channel, __float_as_uint(peak));
}

template <typename Input>
cudaError_t launch_scaled(const MomentLaunch& launch) {
  const cudaError_t error = cudaMemsetAsync(launch.peaks, 0, launch.source.d * sizeof(std::uint32_t), launch.stream);
  if (error != cudaSuccess) return error;
  const auto kernel = launch.access == Access::channels ? peaks_kernel<true> : peaks_kernel<false>;
  kernel<<<dim3((launch.source.d + 31) / 32, kRuns / kRunsOfBlock), 256, 0, launch.stream>>>(launch.source,
                                                                                             launch.peaks);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? sm90::launch_partials<Input, Fp16>(launch) : launched;
}

template <typename Input>
constexpr MomentKernel scaled() {
  MomentKernel kernel = sm90::kSm90<Input, Fp16>;
  kernel.partial = launch_scaled<Input>;
  return kernel;
}

template <typename Input>
constexpr MomentKernel kScaled = scaled<Input>();

}  // namespace

const MomentKernel& sm90_float32_kernel(Precision precision) {
  return precision == Precision::tf32 ? kScaled<sm90::Halves<1>> : kScaled<sm90::Halves<2>>;
}

}  // namespace pyrewrite
