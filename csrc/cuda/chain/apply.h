#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// y = act(scale x + shift + residual). Throws std::runtime_error where CUDA refuses.
void apply_load(const ApplyParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
