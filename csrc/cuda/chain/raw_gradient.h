#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// Forms the gradient of a raw output in one pass, through the pool where there are taps. Throws std::runtime_error
// where CUDA refuses.
void raw_gradient(const RawGradientParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
