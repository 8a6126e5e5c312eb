// The pointwise weights as the forward multiplies by them.
#pragma once

#include "glue.h"
#include "pack.h"

namespace xsep::cpu {

/// How w_pw [C_out, C_in * multiplier, 1, 1] is packed on this chip.
PointwisePacking pointwise_packing(const Tensor& w_pw, int64_t multiplier);

/// One panel of a contiguous w_pw, [depth * kPanelColumns], float or BFloat16.
void pack_one_panel(const Tensor& w, const PointwisePacking& packing, int64_t panel, void* out);

/// w_pw in the order that the plan's panels are multiplied in: [panels, depth * kPanelColumns], float or BFloat16.
Tensor packed_pointwise(const Tensor& w_pw, const PointwisePacking& packing);

/// Whether a tensor can have come from packed_pointwise with that packing.
bool is_packed(const OptionalTensor& packed, const PointwisePacking& packing);

}  // namespace xsep::cpu
