#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// Mean and centred sums of each tile of kStatisticsPixels pixels; the last may be short. Throws std::runtime_error
// where CUDA refuses.
void tile_statistics(const StatisticsParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
