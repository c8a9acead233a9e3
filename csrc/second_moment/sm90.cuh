// The second moment on compute capability 9.0: matrix products of four warps at a time (wgmma) out of a ring of stages
// in shared memory, which boxes fill that the hardware copies, to two blocks at once where they share them: two blocks,
// a cluster, compute a square of 256 x 256 of the moment from its chunks of rows, others a tile of 128 x 128 alone
// (sm90_layout.h).
//
// As on 8.0 the tensor cores' sums (`chain`) are added to other registers (`total`) after few rows, by ordinary
// additions, and those to pairs of floats in the workspace after some thousands.
#pragma once

#include "common/device.h"
#include "second_moment/sm90_halves.cuh"

namespace pyrewrite::sm90 {

// 16-bit input: the sums of a group of four warps. All rows of a chain lie in shared memory together, so its columns
// are taken two units at a time: registers for the chain of 128 columns do for 256.
template <typename Mma, bool kByRow>
__device__ __forceinline__ void compute(BoxRing<Boxes> ring, const GroupWork& work, int count, const Release& release,
                                        Pair* partial) {
  constexpr int kStep = kByRow ? 16 * kLine : 32, kSteps = Boxes::kSliceRows / 16, kSlices = Boxes::kChainSlices;
  static_assert(kChunkRows / Boxes::kSliceRows % kSlices == 0, "chains end with chunks");
  Total<kTotalRows / (kSlices * Boxes::kSliceRows)> total(partial);
  BoxRing<Boxes> begin = ring;
  const auto take = [&](auto first, auto units) {
    constexpr int kFirst = decltype(first)::value, kUnits = decltype(units)::value;
    const bool last = kFirst + kUnits >= work.units;
    float chain[kUnits * kUnit / 2];
    ring = begin;
    int before = 0;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      if (kFirst == 0) ring.wait_full();
      const std::uint64_t a = operand<kLine>(ring.here() + work.a * kUnitBytes, kUnitBytes);
      const std::uint64_t b = operand<kLine>(ring.here() + (work.b + kFirst) * kUnitBytes, kUnitBytes);
      products_begin();
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        multiply<kByRow>(Mma{}, chain, a + step * (kStep / 16), b + step * (kStep / 16), i > 0 || step > 0);
      products_end_group();
      if (i > 0) {
        products_wait<1>();
        if (last) release(before);
      }
      before = ring.stage;
      ring.next();
    }
    products_wait<0>();
    settle(chain);
    if (last) release(before);
    total.template add<kFirst * kUnit / 2>(chain);
  };
  for (int slice = 0; slice < count; slice += kSlices, begin = ring) {
    if (work.units > 1)
      take(Number<0>{}, Number<2>{});
    else
      take(Number<0>{}, Number<1>{});
    if (work.units > 3)
      take(Number<2>{}, Number<2>{});
    else if (work.units > 2)
      take(Number<2>{}, Number<1>{});
    total.end_chain(work.units, slice + kSlices >= count);
  }
}

// A group without work still lets the stages go.
__device__ __forceinline__ void watch(BoxRing<Boxes> ring, int count, const Release& release) {
  for (int slice = 0; slice < count; ++slice, ring.next()) {
    ring.wait_full();
    __syncwarp();  // no lane is left behind by more than a phase, which it could not tell from the next but one
    release(ring.stage);
  }
}

// Empty in code for other architectures than 90a (see code_here).
template <typename Input, typename Mma, bool kByRow>
__global__ void __launch_bounds__(Input::kThreads, 1)
    sm90_moment(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kSlicesOfChunk = kChunkRows / Input::kSliceRows;
  constexpr int kConverters = kGroupThreads / 32, kMultipliers = kGroups * kGroupThreads / 32;  // warps
  extern __shared__ unsigned char dynamic[];
  __shared__ alignas(8) std::uint64_t barriers[2 * BoxRing<Input>::kMostStages];
  const int rank = args.plan.cluster == 1 ? 0 : block_of_cluster();
  const BlockWork work = args.plan.work(blockIdx.x);
  const Place place = args.plan.place(work.tile, args.source.d);
  const int count = (args.plan.chunks - work.first + work.step - 1) / work.step * kSlicesOfChunk;
  const bool together = is_shared(place.shape);
  const int senders = together ? senders_of(place.shape, place.block) : 1 << rank;
  const int receivers = together ? __popc(receivers_of(place.shape, place.block)) : 1;
  const BoxRing<Input> ring((shared_address(dynamic) + 1023) & ~1023u, barriers, slots_in(place.shape) * kUnitBytes,
                            Input::kRingBytes);
  if (threadIdx.x == 0) ring.begin(1, receivers * Input::kReaders);  // one thread, and the bytes that are copied
  const int group = threadIdx.x / kGroupThreads;
  const GroupWork mine = group < kGroups ? place.work(group) : GroupWork{};
  const Release release(ring.empty(0), senders);
  Pair* const partial = args.workspace + static_cast<std::int64_t>(blockIdx.x) * kElements + first_position(group) +
                        threadIdx.x % kGroupThreads;
  if constexpr (Input::kFromFloat32) {
    __shared__ alignas(8) std::uint64_t half_barriers[2 * HalfRing<Input>::kMostStages];
    const Columns columns = columns_of(place.shape, place.block);
    const HalfRing<Input> halves(ring.stages + Input::kRingBytes, half_barriers,
                                 columns.count * Input::kNumbers * Input::kHalfUnit, Input::kHalfRingBytes);
    if (threadIdx.x == 0) {
      halves.begin(kConverters, kMultipliers);
      barrier_init_done();
    }
    cluster_sync();  // every block's barriers are there
    if (count > 0) {
      if (group < kGroups) {
        more_registers<Input::kRegisters>();
        if (mine.units > 0)
          compute_halves<Input, kByRow>(ring, halves, mine, columns, count, release,
                                        Lines<kByRow>(args.peaks, place.channel(mine.a), place.d), partial);
        else
          watch_halves<Input>(ring, halves, count, release);
      } else if (group == kGroups) {
        fewer_registers<Input::kConvertRegisters>();
        convert<Input, kByRow>(ring, halves, place, columns, count, release, args.peaks);
      } else {
        fewer_registers<Input::kCopyRegisters>();
        if (threadIdx.x == (kGroups + 1) * kGroupThreads)
          copy_boxes<Input, kByRow>(ring, &map, args, place, work, count);
      }
    }
  } else {
    if (threadIdx.x == 0) barrier_init_done();
    cluster_sync();
    if (group < kGroups) {
      more_registers<Input::kRegisters>();
      if (mine.units > 0)
        compute<Mma, kByRow>(ring, mine, count, release, partial);
      else
        watch(ring, count, release);
    } else {
      fewer_registers<Input::kCopyRegisters>();
      if (threadIdx.x == kGroups * kGroupThreads) copy_boxes<Input, kByRow>(ring, &map, args, place, work, count);
    }
  }
  __syncwarp();
  cluster_sync();  // no block ends while another may write to it
#endif
}

// The map of boxes whose lines are kLine bytes: 64 x 64 numbers of 16 bits; of float32 32 rows and 32 channels, or the
// 64 channels of a unit and 32 rows. No library of the driver is linked: the runtime finds the function.
inline cudaError_t make_map(const MomentLaunch& launch, CUtensorMap* map) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorSymbolNotFound;
  const Source& source = launch.source;
  const bool by_row = launch.access == Access::channels;
  const cuuint64_t d = source.d, width = source.width.divisor, images = source.rows / width;
  const cuuint64_t sizes[3] = {by_row ? d : width, by_row ? width : d, images};
  const cuuint32_t size = launch.dtype == DType::float32 ? 4 : 2;
  const cuuint64_t across = size * static_cast<cuuint64_t>(by_row ? source.pixel_stride : source.channel_stride);
  // The stride of a single image is not used, but it must be one that could be.
  const cuuint64_t strides[2] = {across, images > 1 ? size * static_cast<cuuint64_t>(source.image_stride) : across};
  const cuuint32_t lines = by_row ? slice_rows(launch.dtype) : kUnit;
  const cuuint32_t box[3] = {kLine / size, lines, 1}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType type = launch.dtype == DType::float32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : launch.dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = reinterpret_cast<Encode>(function)(
      map, type, 3, const_cast<void*>(source.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Input, typename Mma, bool kByRow>
cudaError_t launch_partial(const MomentLaunch& launch) {
  const auto kernel = sm90_moment<Input, Mma, kByRow>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Input::kBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap map{};
  error = make_map(launch, &map);
  if (error != cudaSuccess) return error;
  const std::uint32_t slices = (launch.source.width.divisor + Input::kSliceRows - 1) / Input::kSliceRows;
  const Arguments arguments{launch.source, {make_divider(slices)}, launch.clusters, launch.workspace, launch.peaks};
  const ClusterLaunch clusters(launch.clusters.cluster, dim3(launch.clusters.blocks()), Input::kThreads, Input::kBytes,
                               launch.stream);
  return cudaLaunchKernelEx(&clusters.config, kernel, map, arguments);
}

// The kernels of rows and of NCHW need the same.
template <typename Input, typename Mma>
int pairs_at_once() {
  return clusters_at_once(reinterpret_cast<const void*>(sm90_moment<Input, Mma, true>), 2, Input::kThreads,
                          Input::kBytes);
}

// 16-bit input, or float32 input of which `peaks` holds the scales.
template <typename Input, typename Mma>
cudaError_t launch_partials(const MomentLaunch& launch) {
  return launch.access == Access::channels ? launch_partial<Input, Mma, true>(launch)
                                           : launch_partial<Input, Mma, false>(launch);
}

// The reduction's view of the plan and of a block's sums (see reduce.cuh).
template <bool kPaired>
struct PlacedSums {
  static constexpr int kElements = sm90::kElements;
  static const ClusterPlan& plan(const MomentLaunch& launch) { return launch.clusters; }
  static __device__ __forceinline__ TileElement element(const ClusterPlan& plan, int tile, int position, int d) {
    return plan.place(tile, d).element(position, kPaired);
  }
};

template <typename Input>
cudaError_t reduce_input(const MomentLaunch& launch) {
  if constexpr (Input::kFromFloat32)
    return reduce_typed<PlacedSums<true>, float>(launch);
  else
    return reduce_16bit<PlacedSums<false>>(launch);
}

template <typename Input, typename Mma>
constexpr MomentKernel kSm90{kTile,
                             16,
                             1,
                             3,
                             Input::kBytes,
                             launch_partials<Input, Mma>,
                             reduce_input<Input>,
                             Input::kFromFloat32,
                             &Input::kCosts,
                             pairs_at_once<Input, Mma>};

}  // namespace pyrewrite::sm90
