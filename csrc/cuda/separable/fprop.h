#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// y = epilogue(pw(middle(dw(prologue(x)))) + bias), z never leaving the chip. The plan must be fused. Throws
// std::runtime_error where CUDA refuses.
void separable_fprop(const SeparableFpropParams& p, cudaStream_t stream);

// plan_separable_fprop, whose answers are kept.
SeparablePlan kept_separable_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                  const DeviceProperties& device);

}  // namespace xsep::cuda
