// The second moment on compute capability 9.0: matrix products of four warps at a time (wgmma) out of a ring of stages
// in shared memory, which other warps fill. Four blocks, a cluster, compute a square of 256 x 256 of the moment from
// its chunks of rows. Every unit of 64 channels is read once for the whole cluster and goes to all blocks that need it:
// 16-bit input as boxes that the hardware copies to several blocks at once, float32 input through registers, where it
// is scaled and rounded to half numbers (two of them for a result as good as float32).
//
// As on 8.0 the tensor cores' sums (`chain`) are added to other registers (`total`) after few rows, by ordinary
// additions, and those to pairs of floats in the workspace after some thousands.
#pragma once

#include "second_moment/reduce.cuh"
#include "second_moment/sm90_layout.h"
#include "second_moment/sm90_ptx.cuh"

namespace pyrewrite::sm90 {

struct Boxes {  // 16-bit input
  static constexpr int kPlanes = 1, kStages = 6, kChainSlices = 2;
  static constexpr int kThreads = kGroups * kGroupThreads + 32;
  static constexpr bool kFromFloat32 = false;
};
// float32 input as one half number (tf32: as many bits as the tensor cores keep of a float32) or as two. Their products
// are made of three, the smallest of which is left out (2^-22).
template <int kNumbers>
struct Halves {
  static constexpr int kPlanes = kNumbers, kStages = kNumbers == 1 ? 6 : 3, kChainSlices = kNumbers == 1 ? 2 : 1;
  static constexpr int kCopyThreads = 256, kThreads = kGroups * kGroupThreads + kCopyThreads;
  static constexpr bool kFromFloat32 = true;
  static constexpr int kRegisters = 160, kCopyRegisters = 96;  // of a thread of the products and of the copies
  static_assert(kGroups * kGroupThreads * kRegisters + kCopyThreads * kCopyRegisters <= 65536, "registers of a block");
};

constexpr int kTotalRows = 8192;

template <typename Input>
struct Memory {
  static constexpr int kPlaneBytes = kSlots * kUnitBytes, kStageBytes = Input::kPlanes * kPlaneBytes;
  static constexpr int kBytes = Input::kStages * kStageBytes + 1024;  // stages begin at multiples of 1024
  static_assert(kBytes <= 226 * 1024, "shared memory of a block");
};

struct Arguments {
  Source source;
  Slices slices;
  Plan plan;
  Pair* workspace;
  const std::uint32_t* peaks;  // float32 input: of every channel, the bits of a float
  bool single;                 // clusters of one block
};

// Stages of shared memory and their barriers: `full` counts what comes in, `empty` the warps that are done with it.
template <int kStages>
struct Ring {
  std::uint32_t stages, full, empty;
  int stage = 0, phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ std::uint32_t full_barrier() const { return full + 8 * stage; }
  template <bool kPublished>
  __device__ __forceinline__ void wait_full() const {
    barrier_wait<kPublished>(full + 8 * stage, phase);
  }
  __device__ __forceinline__ void wait_empty() const { barrier_wait<false>(empty + 8 * stage, phase ^ 1); }
};

// The sums of a group of four warps.
template <typename Input, typename Mma, bool kByRow, int kColumns>
__device__ __forceinline__ void compute(Ring<Input::kStages> ring, const GroupWork& work, int count, int senders,
                                        Pair* partial) {
  using M = Memory<Input>;
  constexpr int kOwn = kColumns / 2;  // sums of a thread
  constexpr int kStep = kByRow ? 16 * kLine : 32, kSteps = kSliceRows / 16;
  constexpr int kChains = kTotalRows / (Input::kChainSlices * kSliceRows);  // of a total
  static_assert(kSlicesOfChunk % Input::kChainSlices == 0, "chains end with chunks");
  const int lane = threadIdx.x % 32;
  const std::uint32_t sender = lane < 4 && (senders >> lane & 1) ? in_block(ring.empty, lane) : 0;
  const auto release = [&](int stage) {
    if (sender != 0) barrier_arrive<false>(sender + 8 * stage);
  };
  float chain[kOwn], total[kOwn] = {};
  bool written = false;
  int chains = 0;
  for (int slice = 0; slice < count; slice += Input::kChainSlices) {
    int before = 0;
#pragma unroll
    for (int i = 0; i < Input::kChainSlices; ++i) {
      ring.template wait_full<Input::kFromFloat32>();
      if constexpr (Input::kFromFloat32) fence_for_products();
      const std::uint32_t stage = ring.stages + ring.stage * M::kStageBytes;
      const auto at = [&](int slot, int plane) {
        return operand(stage + plane * M::kPlaneBytes + slot * kUnitBytes, kUnitBytes);
      };
      const auto multiply_all = [&](int a_plane, int b_plane, bool begin) {
        const std::uint64_t a = at(work.a, a_plane), b = at(work.b, b_plane);
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          multiply<kByRow>(Mma{}, chain, a + step * (kStep / 16), b + step * (kStep / 16), !begin || step > 0);
      };
      products_begin();
      if constexpr (Input::kPlanes == 2) {  // small products first: cut sums of small numbers lose little
        multiply_all(0, 1, i == 0);
        multiply_all(1, 0, false);
        multiply_all(0, 0, false);
      } else {
        multiply_all(0, 0, i == 0);
      }
      products_end_group();
      if (i > 0) {
        products_wait<1>();
        release(before);
      }
      before = ring.stage;
      ring.next();
    }
    products_wait<0>();
    settle(chain);
    release(before);
#pragma unroll
    for (int e = 0; e < kOwn; ++e) total[e] = __fadd_rn(total[e], chain[e]);
    if (++chains < kChains && slice + Input::kChainSlices < count) continue;
    chains = 0;
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      Pair sum{total[e], 0.f};
      if (written) {
        sum = partial[e * kGroupThreads];
        add_to_pair(sum, total[e]);
      }
      partial[e * kGroupThreads] = sum;
      total[e] = 0.f;
      if (e % 8 == 7) __syncwarp();  // no more loads under way than there are registers for
    }
    written = true;
  }
}

// A group without work still lets the stages go.
template <int kStages>
__device__ __forceinline__ void watch(Ring<kStages> ring, int count, int senders) {
  const int lane = threadIdx.x % 32;
  for (int slice = 0; slice < count; ++slice, ring.next()) {
    ring.template wait_full<false>();
    if (lane < 4 && (senders >> lane & 1)) barrier_arrive<false>(in_block(ring.empty + 8 * ring.stage, lane));
  }
}

// 16-bit input: one thread starts the copies.
template <typename Input, bool kByRow>
__device__ __forceinline__ void copy_boxes(Ring<Input::kStages> ring, const CUtensorMap* map, const Arguments& args,
                                           const Square& square, const BlockWork& work, int block, int count) {
  const int bytes = square.arriving(block) * kUnitBytes;
  int channels[2], blocks[2];
  std::uint32_t to[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Share share = share_of(square.shape, block, i);
    channels[i] = square.channel(block, share.slot);
    blocks[i] = square.there(block, share.slot) ? share.blocks : 0;
    to[i] = ring.stages + share.slot * kUnitBytes;
  }
  for (int slice = 0; slice < count; ++slice, ring.next()) {
    const std::uint32_t number = (work.first + slice / kSlicesOfChunk * work.step) * kSlicesOfChunk +
                                 static_cast<std::uint32_t>(slice % kSlicesOfChunk);
    const int image = static_cast<int>(args.slices.of_image(number));
    const int row = static_cast<int>(number - image * args.slices.of_image.divisor) * kSliceRows;
    const std::uint32_t stage = ring.stage * Memory<Input>::kStageBytes;
    ring.wait_empty();
    barrier_expect(ring.full_barrier(), bytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (blocks[i] == 0) continue;
      const int inner = kByRow ? channels[i] : row, middle = kByRow ? row : channels[i];
      if (args.single)
        copy_box(to[i] + stage, map, inner, middle, image, ring.full_barrier());
      else
        copy_box(to[i] + stage, map, inner, middle, image, ring.full_barrier(), blocks[i]);
    }
  }
}

// float32 input. A thread brings four numbers of four lines of a unit, 16 lines apart, into all blocks that need it.
// Two units at most; the loads of a slice are on their way while the one before is multiplied.
template <typename Input, bool kByRow>
struct Copier {
  static constexpr int kLines = 4, kApart = kUnit / kLines;
  using M = Memory<Input>;

  const Source& source;
  std::int64_t step,
      across[2];             // elements: from one line of the thread to the next, and from a row to a unit's channel
  bool whole;                // all 64 channels of the units, and rows at equal distances where they are lines
  int line, along;           // the thread's first line, and its first number in it
  float4 values[2][kLines];  // unit x line
  float scale[2][4];         // unit x number (channels side by side) or line
  int channel[2];            // of the thread's first number
  bool mine[2];
  std::uint32_t to[2];        // in the first stage of this block
  std::uint64_t peers[2][2];  // and of others (0: none)

  __device__ __forceinline__ Copier(const Source& from, const Square& square, int block, std::uint32_t stages,
                                    const std::uint32_t* peaks, int thread)
      : source(from) {
    line = thread / 16, along = thread % 16 * 4;
    whole = !kByRow || source.width.divisor >= source.rows;
    step = kApart * (kByRow ? source.pixel_stride : source.channel_stride);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const Share share = share_of(square.shape, block, u);
      const int first = square.channel(block, share.slot);
      mine[u] = share.blocks != 0 && first < square.d;
      if (mine[u] && first + kUnit > square.d) whole = false;
      channel[u] = first + (kByRow ? along : line);
      across[u] = channel[u] * (kByRow ? 1 : source.channel_stride);
      to[u] = stages + share.slot * kUnitBytes + turned(line, along * 2);
      const int others = share.blocks & ~(1 << block), rest = others & (others - 1);
      peers[u][0] = others != 0 ? pointer_in_block(to[u], __ffs(others) - 1) : 0;
      peers[u][1] = rest != 0 ? pointer_in_block(to[u], __ffs(rest) - 1) : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = channel[u] + (kByRow ? i : kApart * i);
        scale[u][i] = mine[u] && c < square.d ? __int_as_float((scale_exponent(peaks[c]) + 127) << 23) : 0.f;
      }
    }
  }

  __device__ __forceinline__ void load(std::uint32_t row) {
    const float* x = static_cast<const float*>(source.x);
    const std::uint32_t n = row + (kByRow ? line : along);
    if (whole && row + kSliceRows <= source.rows) {
      const float* from = x + (kByRow ? n * source.pixel_stride : source.offset(n));
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (!mine[u]) continue;
        const float* at = from + across[u];
#pragma unroll
        for (int i = 0; i < kLines; ++i, at += step) values[u][i] = __ldg(reinterpret_cast<const float4*>(at));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const std::uint32_t here = kByRow ? n + kApart * i : n;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        values[u][i] = {0.f, 0.f, 0.f, 0.f};
        const int left = source.d - channel[u] - (kByRow ? 0 : kApart * i);  // channels from here on
        if (!mine[u] || here >= source.rows || left <= 0) continue;
        const float* from = x + source.offset(here) + across[u] + (kByRow ? 0 : i * step);
        if (!kByRow || left >= 4) {  // pixels come in whole fours
          values[u][i] = __ldg(reinterpret_cast<const float4*>(from));
        } else {
          values[u][i].x = from[0];
          if (left > 1) values[u][i].y = from[1];
          if (left > 2) values[u][i].z = from[2];
        }
      }
    }
  }

  __device__ __forceinline__ void store(int stage) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (!mine[u]) continue;
      const std::uint32_t at = stage * M::kStageBytes;
      const Places places{to[u] + at, peers[u][0] + at, peers[u][1] + at, peers[u][0] != 0, peers[u][1] != 0};
      put<0>(u, places);
      put<1>(u, places);
      put<2>(u, places);
      put<3>(u, places);
    }
  }

 private:
  struct Places {
    std::uint32_t here;
    std::uint64_t first, second;
    bool has_first, has_second;
  };

  template <int kIndex>
  __device__ __forceinline__ void put(int u, const Places& places) const {
    constexpr int kOffset = kIndex * kApart * kLine;  // lines 8 apart are turned alike
    static_assert(kApart % 8 == 0, "turned alike");
    const float4 value = values[u][kIndex];
    const float x = value.x * scale[u][kByRow ? 0 : kIndex], y = value.y * scale[u][kByRow ? 1 : kIndex];
    const float z = value.z * scale[u][kByRow ? 2 : kIndex], w = value.w * scale[u][kByRow ? 3 : kIndex];
    const __half2 first = __floats2half2_rn(x, y), second = __floats2half2_rn(z, w);
    send<kOffset>(places, first, second);
    if constexpr (Input::kPlanes == 2) {
      const float2 a = __half22float2(first), b = __half22float2(second);
      send<kOffset + M::kPlaneBytes>(places, __floats2half2_rn(x - a.x, y - a.y), __floats2half2_rn(z - b.x, w - b.y));
    }
  }

  template <int kOffset>
  static __device__ __forceinline__ void send(const Places& places, __half2 first, __half2 second) {
    const std::uint32_t words[2] = {*reinterpret_cast<const std::uint32_t*>(&first),
                                    *reinterpret_cast<const std::uint32_t*>(&second)};
    store_pair<kOffset>(places.here, words);
    if (places.has_first) store_pair_there<kOffset>(places.first, words);
    if (places.has_second) store_pair_there<kOffset>(places.second, words);
  }
};

template <typename Input, bool kByRow>
__device__ __forceinline__ void copy_halves(Ring<Input::kStages> ring, const Arguments& args, const Square& square,
                                            const BlockWork& work, int block, int count) {
  const int thread = threadIdx.x - kGroups * kGroupThreads, lane = threadIdx.x % 32;
  Copier<Input, kByRow> copier(args.source, square, block, ring.stages, args.peaks, thread);
  const int receivers = receivers_of(square.shape, block);
  const std::uint32_t receiver = lane < 4 && (receivers >> lane & 1) ? in_block(ring.full, lane) : 0;
  const auto row_of = [&](int slice) {
    const std::uint32_t chunk = work.first + slice / kSlicesOfChunk * work.step;
    return chunk * kChunkRows + slice % kSlicesOfChunk * kSliceRows;
  };
  copier.load(row_of(0));
  for (int slice = 0; slice < count; ++slice, ring.next()) {
    ring.wait_empty();
    copier.store(ring.stage);
    // The next loads are on their way before the fence, which waits for memory as well.
    if (slice + 1 < count) copier.load(row_of(slice + 1));
    fence_for_products();
    __syncwarp();
    if (receiver == 0) continue;
    if (args.single)
      barrier_arrive<false>(receiver + 8 * ring.stage);
    else
      barrier_arrive<true>(receiver + 8 * ring.stage);
  }
}

// Without code for 9.0a the kernel is empty and has no shared memory of its own, which is_built sees.
template <typename Input, typename Mma, bool kByRow>
__global__ void __launch_bounds__(Input::kThreads, 1)
    sm90_moment(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kStages = Input::kStages, kWarps = kGroups * kGroupThreads / 32;
  extern __shared__ unsigned char dynamic[];
  __shared__ alignas(8) std::uint64_t barriers[2 * kStages];
  const int blocks = args.single ? 1 : 4, block = args.single ? 0 : block_of_cluster();
  const int cluster = blockIdx.x / blocks;
  const BlockWork work = args.plan.work(cluster);
  const Square square = square_of(args.plan.place(work.tile), args.single, args.source.d);
  const int count = (args.plan.chunks - work.first + work.step - 1) / work.step * kSlicesOfChunk;
  const int receivers = receivers_of(square.shape, block), senders = senders_of(square.shape, block);
  Ring<kStages> ring{};
  ring.stages = (shared_address(dynamic) + 1023) & ~1023u;
  ring.full = shared_address(barriers);
  ring.empty = ring.full + 8 * kStages;
  if (threadIdx.x == 0) {
    // Warps that write, or one thread and the bytes that are copied.
    const int full = Input::kFromFloat32 ? __popc(senders) * ((Input::kThreads - kGroups * kGroupThreads) / 32) : 1;
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(ring.full + 8 * stage, full);
      barrier_init(ring.empty + 8 * stage, __popc(receivers) * kWarps);
    }
    barrier_init_done();
  }
  cluster_sync();  // every block's barriers are there
  const int group = threadIdx.x / kGroupThreads;
  if (group < kGroups) {
    if constexpr (Input::kFromFloat32) more_registers<Input::kRegisters>();
    const GroupWork mine = square.work(block, group);
    const int side = side_of(square.shape);
    Pair* const partial = args.workspace + static_cast<std::int64_t>(cluster) * side * side +
                          first_position(block, group) + threadIdx.x % kGroupThreads;
    if (mine.columns == 128)
      compute<Input, Mma, kByRow, 128>(ring, mine, count, senders, partial);
    else if (mine.columns == 64)
      compute<Input, Mma, kByRow, 64>(ring, mine, count, senders, partial);
    else
      watch(ring, count, senders);
  } else {
    if constexpr (Input::kFromFloat32) {
      fewer_registers<Input::kCopyRegisters>();
      copy_halves<Input, kByRow>(ring, args, square, work, block, count);
    } else if (threadIdx.x % 32 == 0) {
      copy_boxes<Input, kByRow>(ring, &map, args, square, work, block, count);
    }
  }
  __syncwarp();
  cluster_sync();  // no block ends while another may write to it
#endif
}

// The map of boxes of 64 x 64 numbers, kLine bytes long. No library of the driver is linked: the runtime finds the
// function.
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
  const cuuint64_t across = 2 * static_cast<cuuint64_t>(by_row ? source.pixel_stride : source.channel_stride);
  // The stride of a single image is not used, but it must be one that could be.
  const cuuint64_t strides[2] = {across, images > 1 ? 2 * static_cast<cuuint64_t>(source.image_stride) : across};
  const cuuint32_t box[3] = {kLine / 2, 64, 1}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType type =
      launch.dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = reinterpret_cast<Encode>(function)(
      map, type, 3, const_cast<void*>(source.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename Input, typename Mma, bool kByRow>
cudaError_t launch_partial(const MomentLaunch& launch, bool single) {
  const auto kernel = sm90_moment<Input, Mma, kByRow>;
  constexpr int kBytes = Memory<Input>::kBytes;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap map{};
  Arguments arguments{launch.source, {}, launch.plan, launch.workspace, launch.peaks, single};
  if constexpr (!Input::kFromFloat32) {
    error = make_map(launch, &map);
    if (error != cudaSuccess) return error;
    arguments.slices.of_image = make_divider((launch.source.width.divisor + kSliceRows - 1) / kSliceRows);
  }
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = single ? 1 : 4;
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.plan.blocks() * shape.val.clusterDim.x);
  config.blockDim = dim3(Input::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = launch.stream;
  config.attrs = &shape;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, map, arguments);
}

template <bool kSingle>
struct Tiles {
  static constexpr int kTile = kSingle ? 128 : 256;
  static PYREWRITE_BOTH TileElement coordinates(int position, bool diagonal) {
    return element_at(kSingle ? Shape::single : diagonal ? Shape::on : Shape::beside, position);
  }
};

// 16-bit input, or float32 input of which `peaks` finds the scales.
template <typename Input, typename Mma, bool kSingle>
cudaError_t launch_partials(const MomentLaunch& launch) {
  return launch.access == Access::channels ? launch_partial<Input, Mma, true>(launch, kSingle)
                                           : launch_partial<Input, Mma, false>(launch, kSingle);
}

template <typename Input, typename T>
cudaError_t reduce_input(const MomentLaunch& launch) {
  if constexpr (Input::kFromFloat32)
    return reduce_typed<T, float>(launch);
  else
    return reduce_16bit<T>(launch);
}

template <typename Input, typename Mma, bool kSingle>
constexpr MomentKernel kSm90{Tiles<kSingle>::kTile,
                             16,
                             1,
                             kSingle ? 3 : 2,
                             Memory<Input>::kBytes,
                             launch_partials<Input, Mma, kSingle>,
                             reduce_input<Input, Tiles<kSingle>>,
                             kSingle ? 1 : 4,
                             Input::kFromFloat32,
                             !Input::kFromFloat32};

}  // namespace pyrewrite::sm90
