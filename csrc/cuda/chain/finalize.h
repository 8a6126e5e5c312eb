#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// Scale, shift, mean and 1 / sqrt(variance + eps) of tiles' statistics, merged in float64 in a fixed order; moves the
// running statistics as nn.BatchNorm2d does. Throws std::runtime_error where CUDA refuses, as does the other.
void bn_finalize(const FinalizeParams& p, cudaStream_t stream);

// dr's coefficients, dgamma and dbeta.
void bn_backward_finalize(const BackwardFinalizeParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
