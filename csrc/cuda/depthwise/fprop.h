#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// y = epilogue(dw(prologue(x) [+ residual])). Throws std::runtime_error where CUDA refuses.
void depthwise_fprop(const DepthwiseFpropParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
