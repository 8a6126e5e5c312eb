#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// From the gradient of act(u) to that of u, with its shortcut and its sums; the same bits on every run. Throws
// std::runtime_error where CUDA refuses.
void input_gradient(const InputGradientParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
