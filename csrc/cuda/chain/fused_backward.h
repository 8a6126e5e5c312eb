#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// All of a layer's backward in one pass, where the plan says so: dx, dw_pw, and the partial sums that
// sum_bprop_partials adds up to dw_dw and the sums. The same bits on every run. Throws std::runtime_error where CUDA
// refuses.
void fused_backward(const FusedBackwardParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
