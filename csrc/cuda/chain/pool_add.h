#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// t = maxpool(vec(r)) + vec_s(s) over 3 x 3 windows of stride 2, the tap taken and r there. Of equal taps the first; a
// NaN wins, as in PyTorch. Throws std::runtime_error where CUDA refuses.
void pool_add(const PoolAddParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
