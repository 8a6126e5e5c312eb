// The separable operators on PyTorch's stable ABI: in one kernel where the planner has one for all of it, else kernel
// by kernel, with PyTorch's products of matrices between them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "depthwise/operator.h"
#include "device_scope.h"
#include "products.h"
#include "separable/fprop.h"
#include "separable/wgrad.h"
#include "tensor.h"

namespace xsep::cuda {
namespace {

// A layer up to z.
SeparableFpropParams layer_params(const Tensor& x, const Tensor& w_dw, const Ints& geometry) {
  SeparableFpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  p.type = type_of(x, "x");
  p.x = nhwc(x, x, "x", s.n, s.c_in, s.h, s.w);
  p.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  return p;
}

SeparableFpropParams separable_params(const Tensor& x, const Tensor& w_dw, const Tensor& w_pw, const Ints& geometry) {
  SeparableFpropParams p = layer_params(x, w_dw, geometry);
  STD_TORCH_CHECK(w_pw.dim() == 4 && w_pw.size(0) > 0, "w_pw must be [C_out, C_mid, 1, 1]");
  p.c_out = narrow(w_pw.size(0), "C_out");
  p.w_pw = contiguous(w_pw, x, "w_pw", static_cast<int64_t>(p.c_out) * p.shape.c_mid);
  return p;
}

// Everything that is read has to be in p.
SeparablePlan plan_of(const SeparableFpropParams& p, const DeviceScope& device) {
  const bool aligned = is_aligned(p.x) && is_aligned(p.w_pw) && is_aligned(p.residual) && is_aligned(p.addend);
  return kept_separable_plan(p.shape, p.c_out, element_bytes(p.type), aligned, device.properties(p));
}

struct SeparableOutputs {
  Tensor y;
  Tensor statistics, counts;  // without elements where not asked for
};

// Everything but these outputs has to be in p.
SeparableOutputs run_fused(SeparableFpropParams p, const Tensor& x, bool with_statistics, const DeviceScope& device) {
  const ConvShape& s = p.shape;
  Tensor y = new_nhwc(x, s.n, p.c_out, s.p, s.q);
  p.y = y.mutable_data_ptr();
  const int tiles = with_statistics ? p.plan.tiles : 0;
  Tensor statistics = new_flat(x, {tiles, 3, p.c_out}, ScalarType::Float);
  Tensor counts = new_flat(x, {tiles}, ScalarType::Int);
  if (with_statistics) {
    p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
    p.counts = static_cast<int*>(counts.mutable_data_ptr());
  }
  separable_fprop(p, device.stream());
  return {y, statistics, counts};
}

// z by the depthwise kernel.
Tensor depthwise_stage(const SeparableFpropParams& p, const Tensor& x, const Tensor& w_dw,
                       const OptionalTensor& scale_p, const OptionalTensor& shift_p, const OptionalTensor& scale_m,
                       const OptionalTensor& shift_m) {
  DepthwiseFpropParams stage{};
  stage.shape = p.shape;
  const Ints activations{static_cast<int64_t>(p.prologue.activation), static_cast<int64_t>(p.middle.activation)};
  return run_depthwise_fprop(stage, x, w_dw, scale_p, shift_p, scale_m, shift_m, activations,
                             {p.prologue.alpha, p.middle.alpha});
}

Tensor cuda_separable_fprop(Tensor x, Tensor w_dw, Tensor w_pw, OptionalTensor bias, OptionalTensor residual,
                            OptionalTensor scale_p, OptionalTensor shift_p, OptionalTensor scale_m,
                            OptionalTensor shift_m, OptionalTensor scale_e, OptionalTensor shift_e, Ints geometry,
                            Ints activations, Doubles alphas, bool allow_tf32) {
  STD_TORCH_CHECK(activations.size() == 3 && alphas.size() == 3,
                  "three activations and alphas: prologue, middle, epilogue");
  SeparableFpropParams p = separable_params(x, w_dw, w_pw, geometry);
  const ConvShape& s = p.shape;
  p.allow_tf32 = allow_tf32 ? 1 : 0;
  if (residual.has_value()) p.residual = nhwc(*residual, x, "residual", s.n, p.c_out, s.p, s.q);
  p.bias = channel_vector(bias, x, "bias", p.c_out);
  p.prologue = channel_affine(scale_p, shift_p, activations[0], alphas[0], x, {"scale_p", "shift_p"}, s.c_in);
  p.middle = channel_affine(scale_m, shift_m, activations[1], alphas[1], x, {"scale_m", "shift_m"}, s.c_mid);
  p.epilogue = channel_affine(scale_e, shift_e, activations[2], alphas[2], x, {"scale_e", "shift_e"}, p.c_out);
  if (s.c_mid == s.c_in) {  // the fused kernel has no depth multiplier
    const DeviceScope device(x, p);
    p.plan = plan_of(p, device);
    if (p.plan.fused) return run_fused(p, x, false, device).y;
  }
  const OptionalTensor& added = bias.has_value() ? bias : shift_e;
  STD_TORCH_CHECK(!residual.has_value() && !scale_e.has_value() && !(bias.has_value() && shift_e.has_value()) &&
                      p.epilogue.activation == Activation::kIdentity &&
                      !(added.has_value() && added->scalar_type() != x.scalar_type()),
                  "the planner does not fuse ", describe(p), ": behind w_pw there can be one shift of the type of x");
  const Tensor z = depthwise_stage(p, x, w_dw, scale_p, shift_p, scale_m, shift_m);
  const int64_t pixels = static_cast<int64_t>(s.n) * s.p * s.q;
  const Tensor y = linear(matrix(z, pixels, s.c_mid), matrix(w_pw, p.c_out, s.c_mid), added);
  return images(y, s.n, p.c_out, s.p, s.q);
}

SeparableWgradPlan wgrad_plan_of(const SeparableFpropParams& p, const void* dy, const DeviceScope& device) {
  return kept_wgrad_plan(p.shape, p.c_out, element_bytes(p.type), is_aligned(p.x) && is_aligned(dy),
                         device.properties(p));
}

// dw_pw [C_out, C_in] in float32, by the plan, which has to be one on the chip.
Tensor run_wgrad(const SeparableFpropParams& layer, const SeparableWgradPlan& plan, const void* dy, const Tensor& x,
                 const DeviceScope& device) {
  SeparableWgradParams p{layer, plan.split, dy, nullptr, nullptr};
  p.layer.plan = plan.walk;
  const int64_t rows = static_cast<int64_t>(plan.walk.workers) * plan.split.shares;
  Tensor partials = new_flat(x, {rows, layer.c_out, layer.shape.c_in}, ScalarType::Float);
  Tensor dw_pw = new_flat(x, {layer.c_out, layer.shape.c_in}, ScalarType::Float);
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  p.dw_pw = static_cast<float*>(dw_pw.mutable_data_ptr());
  separable_wgrad(p, device.stream());
  return dw_pw;
}

// dw_pw [C_out, C_in] in float32 of dy [N, C_out, P, Q]. Only where the planner has a kernel for it.
Tensor cuda_separable_wgrad(Tensor dy, Tensor x, Tensor w_dw, OptionalTensor scale_p, OptionalTensor shift_p,
                            Ints geometry, int64_t activation, double alpha) {
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(1) > 0, "dy must be [N, C_out, P, Q]");
  SeparableFpropParams p = layer_params(x, w_dw, geometry);
  const ConvShape& s = p.shape;
  p.c_out = narrow(dy.size(1), "C_out");
  p.prologue = channel_affine(scale_p, shift_p, activation, alpha, x, {"scale_p", "shift_p"}, s.c_in);
  const void* of_dy = nhwc(dy, x, "dy", s.n, p.c_out, s.p, s.q);
  const DeviceScope device(x, p);
  const SeparableWgradPlan plan = wgrad_plan_of(p, of_dy, device);
  STD_TORCH_CHECK(plan.on_chip, "the planner has no kernel for the pointwise weights' gradient of ", describe(p));
  return run_wgrad(p, plan, of_dy, x, device);
}

// Of dy [N, C_out, P, Q], where nothing stands between the convolutions or behind them but a bias: dx, dw_dw, dw_pw,
// dscale_p, dshift_p, all but dx and dw_dw in float32; what is not wanted comes back empty. z is made again: on the
// chip where that should pay, else it is gone before dz is made.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cuda_separable_bprop(Tensor dy, Tensor x, Tensor w_dw, Tensor w_pw,
                                                                        OptionalTensor scale_p, OptionalTensor shift_p,
                                                                        Ints geometry, int64_t activation, double alpha,
                                                                        Ints wanted) {
  STD_TORCH_CHECK(wanted.size() == 5, "wanted must hold 5 flags: dx, dw_dw, dw_pw, dscale_p, dshift_p");
  SeparableFpropParams p = separable_params(x, w_dw, w_pw, geometry);
  const ConvShape& s = p.shape;
  p.prologue = channel_affine(scale_p, shift_p, activation, alpha, x, {"scale_p", "shift_p"}, s.c_in);
  const void* of_dy = nhwc(dy, x, "dy", s.n, p.c_out, s.p, s.q);
  const int64_t pixels = static_cast<int64_t>(s.n) * s.p * s.q;
  const auto nothing = [&](ScalarType type) { return new_flat(x, {0}, type); };
  Tensor dw_pw = nothing(ScalarType::Float);
  const auto as_filter = [&](const Tensor& dw) { return seen_as(dw, {p.c_out, s.c_mid, 1, 1}, {s.c_mid, 1, 1, 1}); };
  SeparableWgradPlan plan{};
  if (wanted[2] != 0) {
    const DeviceScope device(x, p);
    plan = wgrad_plan_of(p, of_dy, device);
    if (pays(plan)) dw_pw = as_filter(run_wgrad(p, plan, of_dy, x, device));
  }
  if (wanted[2] != 0 && !pays(plan)) {
    const Tensor z = depthwise_stage(p, x, w_dw, scale_p, shift_p, std::nullopt, std::nullopt);
    dw_pw = as_filter(wide_mm(transposed_matrix(dy, pixels, p.c_out), matrix(z, pixels, s.c_mid)));
  }
  if ((wanted[0] | wanted[1] | wanted[3] | wanted[4]) == 0) {
    return {nothing(x.scalar_type()), nothing(x.scalar_type()), dw_pw, nothing(ScalarType::Float),
            nothing(ScalarType::Float)};
  }
  const Tensor product = mm(matrix(dy, pixels, p.c_out), matrix(w_pw, p.c_out, s.c_mid));
  auto [dx, dw_dw, dscale, dshift] =
      run_depthwise_bprop(images(product, s.n, s.c_mid, s.p, s.q), x, w_dw, scale_p, shift_p, std::nullopt, geometry,
                          activation, alpha, {wanted[0], wanted[1], wanted[3], wanted[4]});
  return {dx, dw_dw, dw_pw, dscale, dshift};
}

// A layer of the training chain: (r, statistics [tiles, 3, C_out], counts [tiles], x_pre). The last three have no
// elements where there are no statistics or no addend.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_separable_fprop_chain(Tensor x, OptionalTensor addend, Tensor w_dw,
                                                                      Tensor w_pw, OptionalTensor scale_p,
                                                                      OptionalTensor shift_p, Ints geometry,
                                                                      int64_t activation, double alpha, bool allow_tf32,
                                                                      bool with_statistics) {
  SeparableFpropParams p = separable_params(x, w_dw, w_pw, geometry);
  const ConvShape& s = p.shape;
  STD_TORCH_CHECK(s.c_mid == s.c_in, "the fused kernel has no depth multiplier");
  p.allow_tf32 = allow_tf32 ? 1 : 0;
  p.prologue = channel_affine(scale_p, shift_p, activation, alpha, x, {"scale_p", "shift_p"}, s.c_in);
  Tensor x_pre = addend.has_value() ? new_nhwc(x, s.n, s.c_in, s.h, s.w) : new_flat(x, {0}, x.scalar_type());
  if (addend.has_value()) {
    STD_TORCH_CHECK(
        s.stride_h == 1 && s.stride_w == 1 && s.pad_top == s.r / 2 && s.pad_left == s.s / 2 && s.p == s.h && s.q == s.w,
        "an addend needs stride 1 and padding that keeps the size");
    p.addend = nhwc(*addend, x, "addend", s.n, s.c_in, s.h, s.w);
    p.x_pre = x_pre.mutable_data_ptr();
  }
  const DeviceScope device(x, p);
  p.plan = plan_of(p, device);
  const SeparableOutputs out = run_fused(p, x, with_statistics, device);
  return {out.y, out.statistics, out.counts, x_pre};
}

}  // namespace
}  // namespace xsep::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(XSEP_NAMESPACE, m) {
  m.def(
      "cuda_separable_fprop(Tensor x, Tensor w_dw, Tensor w_pw, Tensor? bias, Tensor? residual, Tensor? scale_p, "
      "Tensor? shift_p, Tensor? scale_m, Tensor? shift_m, Tensor? scale_e, Tensor? shift_e, int[] geometry, "
      "int[] activations, float[] alphas, bool allow_tf32) -> Tensor");
  m.def(
      "cuda_separable_bprop(Tensor dy, Tensor x, Tensor w_dw, Tensor w_pw, Tensor? scale_p, Tensor? shift_p, "
      "int[] geometry, int activation, float alpha, int[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_separable_wgrad(Tensor dy, Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, int[] geometry, "
      "int activation, float alpha) -> Tensor");
  m.def(
      "cuda_separable_fprop_chain(Tensor x, Tensor? addend, Tensor w_dw, Tensor w_pw, Tensor? scale_p, "
      "Tensor? shift_p, int[] geometry, int activation, float alpha, bool allow_tf32, bool statistics) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, XSEP_DISPATCH_KEY, m) {
  m.impl("cuda_separable_fprop", TORCH_BOX(&xsep::cuda::cuda_separable_fprop));
  m.impl("cuda_separable_bprop", TORCH_BOX(&xsep::cuda::cuda_separable_bprop));
  m.impl("cuda_separable_wgrad", TORCH_BOX(&xsep::cuda::cuda_separable_wgrad));
  m.impl("cuda_separable_fprop_chain", TORCH_BOX(&xsep::cuda::cuda_separable_fprop_chain));
}
