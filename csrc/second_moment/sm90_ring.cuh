// The ring of stages of the Hopper kernels: what fills it, who lets its stages go, and where sums go.
#pragma once

#include "second_moment/reduce.cuh"
#include "second_moment/sm90_layout.h"
#include "second_moment/sm90_ptx.cuh"

namespace pyrewrite::sm90 {

constexpr int kTotalRows = 8192;

struct Boxes {  // 16-bit input, multiplied as it comes
  static constexpr bool kFromFloat32 = false;
  static constexpr int kSliceRows = 64, kChainSlices = 2;
  static constexpr int kThreads = kGroups * kGroupThreads + 128;
  static constexpr int kRegisters = 232, kCopyRegisters = 40;                // of a thread that multiplies, or copies
  static constexpr int kReaders = kGroups * kGroupThreads / 32;              // warps that read a stage
  static constexpr int kRingBytes = 192 * 1024, kBytes = kRingBytes + 1024;  // stages begin at multiples of 1024
  static constexpr Costs kCosts{288, 192, 160, 112};
};
// float32 input as one half number (tf32: as many bits as the tensor cores keep of a float32) or as two. Their products
// are made of three, the smallest of which is left out (2^-22).
template <int kNumbers_>
struct Halves {
  static constexpr bool kFromFloat32 = true;
  static constexpr int kNumbers = kNumbers_, kSliceRows = 32, kChainSlices = kNumbers == 1 ? 2 : 1;
  static constexpr int kThreads = kGroups * kGroupThreads + 256;  // a group that converts, and one to copy
  static constexpr int kReaders = (kGroups + 1) * kGroupThreads / 32;
  static constexpr int kRegisters = 216, kConvertRegisters = 56, kCopyRegisters = 24;  // of a thread
  static constexpr int kHalfUnit = kUnitBytes / 2;                                     // of the columns
  static constexpr int kRingBytes = 160 * 1024, kHalfRingBytes = 64 * 1024, kBytes = kRingBytes + kHalfRingBytes + 1024;
  static constexpr Costs kCosts = kNumbers == 1 ? Costs{576, 464, 352, 272} : Costs{896, 0, 512, 400};
  static_assert(kGroupThreads * (kGroups * kRegisters + kConvertRegisters + kCopyRegisters) <= 65536, "registers");
};
static_assert(Boxes::kBytes <= 226 * 1024 && Halves<1>::kBytes <= 226 * 1024 && Halves<2>::kBytes <= 226 * 1024,
              "shared memory of a block");

struct Arguments {
  Source source;
  Slices slices;
  ClusterPlan plan;
  Pair* workspace;
  const std::uint32_t* peaks;  // float32 input: of every channel, the bits of a float
};

// Stages of shared memory and their barriers: `full` counts what comes in, `empty` the warps that are done with it. As
// many stages as there is room for, at most kMost.
template <int kMost>
struct Ring {
  static constexpr int kMostStages = kMost;
  std::uint32_t stages, full;
  int bytes, count;  // of a stage; of stages
  int stage = 0, phase = 0;

  __device__ __forceinline__ Ring(std::uint32_t at, std::uint64_t (&barriers)[2 * kMost], int stage_bytes, int room)
      : stages(at), full(shared_address(barriers)), bytes(stage_bytes), count(min(room / stage_bytes, kMost)) {}
  __device__ __forceinline__ void begin(int fillers, int readers) const {
    for (int i = 0; i < count; ++i) {
      barrier_init(full + 8 * i, fillers);
      barrier_init(empty(i), readers);
    }
  }
  __device__ __forceinline__ void next() {
    if (++stage == count) stage = 0, phase ^= 1;
  }
  __device__ __forceinline__ std::uint32_t here() const { return stages + stage * bytes; }
  __device__ __forceinline__ std::uint32_t full_barrier() const { return full + 8 * stage; }
  __device__ __forceinline__ std::uint32_t empty_barrier() const { return empty(stage); }
  __device__ __forceinline__ std::uint32_t empty(int of) const { return full + 8 * (kMost + of); }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full_barrier(), phase); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty_barrier(), phase ^ 1); }
};
template <int kValue>
using Number = std::integral_constant<int, kValue>;

template <typename Input>
using BoxRing = Ring<Input::kRingBytes / (2 * kUnitBytes)>;
template <typename Input>
using HalfRing = Ring<Input::kHalfRingBytes / (2 * Input::kNumbers * Input::kHalfUnit)>;

// Lets a warp's stages go: tells the blocks that copy into them.
struct Release {
  std::uint32_t sender;  // of this lane: the barrier of stage 0 there; 0: none

  __device__ __forceinline__ Release(std::uint32_t empty, int senders) {
    const int lane = threadIdx.x % 32;
    sender = lane < 2 && (senders >> lane & 1) ? in_block(empty, lane) : 0;
  }
  __device__ __forceinline__ void operator()(int stage) const {
    if (sender != 0) barrier_arrive(sender + 8 * stage);
  }
};

// A thread's sums over up to kTotalRows, and their place in the workspace.
template <int kChains>
struct Total {
  Pair* partial;
  float sums[kSums] = {};
  int chains = 0;
  bool written = false;

  __device__ __forceinline__ explicit Total(Pair* to) : partial(to) {}

  template <int kFirst, int kCount>
  __device__ __forceinline__ void add(const float (&chain)[kCount]) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[kFirst + e] = __fadd_rn(sums[kFirst + e], chain[e]);
  }
  // All sums of `units` units of columns have taken a chain.
  __device__ __forceinline__ void end_chain(int units, bool last) {
    if (++chains < kChains && !last) return;
    chains = 0;
#pragma unroll
    for (int e = 0; e < kSums; ++e) {
      if (e >= units * (kUnit / 2)) continue;
      Pair sum{sums[e], 0.f};
      if (written) {
        sum = partial[e * kGroupThreads];
        add_to_pair(sum, sums[e]);
      }
      partial[e * kGroupThreads] = sum;
      sums[e] = 0.f;
      if (e % 8 == 7) __syncwarp();  // no more loads under way than there are registers for
    }
    written = true;
  }
};

// One thread starts the copies of a block.
template <typename Input, bool kByRow>
__device__ __forceinline__ void copy_boxes(BoxRing<Input> ring, const CUtensorMap* map, const Arguments& args,
                                           const Place& place, const BlockWork& work, int count) {
  constexpr int kSlicesOfChunk = kChunkRows / Input::kSliceRows;
  // Of float32 a box is 32 numbers wide: two of them where that is half a unit's channels.
  constexpr int kBoxesOfUnit = Input::kFromFloat32 && kByRow ? 2 : 1;
  const int bytes = place.arriving() * kUnitBytes;
  for (int slice = 0; slice < count; ++slice, ring.next()) {
    const std::uint32_t number = (work.first + slice / kSlicesOfChunk * work.step) * kSlicesOfChunk +
                                 static_cast<std::uint32_t>(slice % kSlicesOfChunk);
    const int image = static_cast<int>(args.slices.of_image(number));
    const int row = static_cast<int>(number - image * args.slices.of_image.divisor) * Input::kSliceRows;
    ring.wait_empty();
    barrier_expect(ring.full_barrier(), bytes);
    for (int i = 0; i < kSlots; ++i) {
      const Share share = share_of(place.shape, place.block, i);
      if (share.blocks == 0) break;
      const int channel = place.channel(share.slot);
      if (channel >= place.d) continue;
#pragma unroll
      for (int box = 0; box < kBoxesOfUnit; ++box) {
        const std::uint32_t to = ring.here() + share.slot * kUnitBytes + box * (kUnitBytes / kBoxesOfUnit);
        const int inner = kByRow ? channel + 32 * box : row, middle = kByRow ? row : channel;
        if ((share.blocks & (share.blocks - 1)) == 0)
          copy_box(to, map, inner, middle, image, ring.full_barrier());
        else
          copy_box(to, map, inner, middle, image, ring.full_barrier(), share.blocks);
      }
    }
  }
}

}  // namespace pyrewrite::sm90
