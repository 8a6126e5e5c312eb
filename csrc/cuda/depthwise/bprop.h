#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// Gradients of z = dw(act(scale * x + shift)): dx, and the partial sums of the others, in one pass over x and dz where
// the plan has a sliding window. The same bits on every run. Throws std::runtime_error where CUDA refuses, as do all.
void depthwise_bprop_partials(const DepthwiseBpropParams& p, cudaStream_t stream);

// Adds up what one or several calls of it have left.
void sum_bprop_partials(const SumPartialsParams& p, cudaStream_t stream);

// Both: dx, dw_dw and the sums for scale and shift.
void depthwise_bprop(const DepthwiseBpropParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
