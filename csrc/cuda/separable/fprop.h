#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// y = epilogue(pw(middle(dw(prologue(x)))) + bias), z never leaving the chip. The plan must be fused. Throws
// std::runtime_error where CUDA refuses.
void separable_fprop(const SeparableFpropParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
