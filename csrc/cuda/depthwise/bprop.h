#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// Gradients of z = dw(act(scale * x + shift)): dx, dw_dw and the sums for scale and shift, in one pass over x and dz
// where the plan has a sliding window. The same bits on every run. Throws std::runtime_error where CUDA refuses.
void depthwise_bprop(const DepthwiseBpropParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
