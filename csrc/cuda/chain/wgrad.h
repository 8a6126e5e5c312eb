#pragma once

#include "../separable/wgrad.h"
#include "params.h"

namespace xsep::cuda {

struct ChainWgradParams {
  SeparableWgradParams wgrad;  // without a dy
  WgradExtras extras;
  RawGradientParams gradient;  // without taps and a plan
};

inline std::string describe(const ChainWgradParams& p) { return describe(p.wgrad.layer); }

// dr, and dw_pw of a layer of the training chain by it, z never leaving the chip: 3 x 3, stride 1. The plan must be one
// of plan_chain_wgrad's. Throws std::runtime_error where CUDA refuses.
void chain_wgrad(const ChainWgradParams& p, cudaStream_t stream);

// plan_chain_wgrad, whose answers are kept.
SeparableWgradPlan kept_chain_wgrad_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                         const DeviceProperties& device);

}  // namespace xsep::cuda
