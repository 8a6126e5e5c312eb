// The depthwise backward as other operators call it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "depthwise_bprop.h"

namespace xsep::cpu {

/// Gradients of z = dw(prologue(x)) for x, w_dw, scale_p and shift_p, the last two in float32; empty where not wanted.
/// nchw: dx is to be in that layout, else it is in NHWC. dw_dtype: of w_dw's gradient.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> depthwise_bprop(
    const at::Tensor& dz, const at::Tensor& x, const at::Tensor& w_dw, const std::optional<at::Tensor>& scale_p,
    const std::optional<at::Tensor>& shift_p, at::IntArrayRef geometry, int64_t activation, double alpha,
    std::array<bool, 4> wanted, bool nchw, at::ScalarType dw_dtype, GradientOf dx_of = GradientOf::kX);

}  // namespace xsep::cpu
