#pragma once

#include "../../common/cuda_wgrad_plan.h"
#include "../device.cuh"
#include "params.h"
#include "wgrad_sums.h"

namespace xsep::cuda {

struct SeparableWgradParams {
  SeparableFpropParams layer;  // x, w_dw and the prologue; its plan is that of the walk
  WgradSplit split;
  const void* dy;   // [N, P, Q, C_out]
  float* partials;  // [workers shares, C_out, C_in]: scratch
  float* dw_pw;     // [C_out, C_in]
};

inline std::string describe(const SeparableWgradParams& p) { return describe(p.layer); }

// The second stage of its sums.
inline DwPwSumParams sums_of(const SeparableWgradParams& p) {
  const SeparableFpropParams& layer = p.layer;
  return {layer.c_out, layer.shape.c_in, layer.plan.workers * p.split.shares, p.partials, p.dw_pw};
}

// dw_pw of y = pw(dw(prologue(x))), z never leaving the chip. The plan must be one on the chip. Throws
// std::runtime_error where CUDA refuses.
void separable_wgrad(const SeparableWgradParams& p, cudaStream_t stream);

// plan_separable_wgrad, whose answers are kept.
SeparableWgradPlan kept_wgrad_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                   const DeviceProperties& device);

}  // namespace xsep::cuda
