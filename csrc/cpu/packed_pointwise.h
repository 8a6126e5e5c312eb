// The pointwise weights as the forward multiplies by them.
#pragma once

#include "glue.h"
#include "pack.h"

namespace xsep::cpu {

/// How w_pw [C_out, C_in * multiplier, 1, 1] is packed on this chip.
PointwisePacking pointwise_packing(const Tensor& w_pw, int64_t multiplier);

/// w_pw in the order that the plan's panels are multiplied in: [panels, depth * kPanelColumns], float or BFloat16.
Tensor packed_pointwise(const Tensor& w_pw, const PointwisePacking& packing);

/// Whether a tensor can have come from packed_pointwise with that packing.
bool is_packed(const OptionalTensor& packed, const PointwisePacking& packing);

}  // namespace xsep::cpu
