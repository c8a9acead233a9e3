// What the kernels of the projection share: their parameters and the way from a block's number to its item.
#pragma once

#include "projection/params.h"

namespace pyrewrite {

// A block an output channel; those of item n begin at first_block[n].
struct ProjectionLaunch {
  ProjectionItem items[kItemsPerLaunch];
  int first_block[kItemsPerLaunch + 1];
  int tile[kItemsPerLaunch];  // input channels at a time; strided kernel only
  int count;
  AdamSettings adam;
};
static_assert(sizeof(ProjectionLaunch) <= 4096, "kernel parameters");

#if defined(__CUDACC__)
__device__ inline int item_of_block(const ProjectionLaunch& launch) {
  int n = 0;
  while (static_cast<int>(blockIdx.x) >= launch.first_block[n + 1]) ++n;
  return n;
}
#endif

}  // namespace pyrewrite
