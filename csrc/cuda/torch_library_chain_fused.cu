// Those of the training chain's operators that form dr on the chip, on PyTorch's stable ABI: a layer's backward in one
// pass, and its pointwise weights' gradient.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "chain/fused_backward.h"
#include "chain/tensor.h"
#include "chain/wgrad.h"
#include "depthwise/bprop.h"
#include "device_scope.h"

namespace xsep::cuda {
namespace {

// (dx, dw_dw [C_in, 1, 3, 3], dw_pw [C_out, C_in], sums [sums, C_in]). Only where the planner says so, of tensors that
// start on 16 bytes.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_chain_fused_backward(
    Tensor du, OptionalTensor taps, Tensor r, Tensor coef, Ints pads, Tensor w_pw, Tensor w_dw, Tensor x,
    OptionalTensor vec, OptionalTensor shortcut, OptionalTensor operand_1, OptionalTensor operand_2,
    OptionalTensor centres, bool before_mask, Ints geometry, int64_t activation, double alpha) {
  FusedBackwardParams p{};
  p.gradient = raw_gradient_of({du, taps, r, coef}, pads);
  const int c_out = p.gradient.shape.c;
  DepthwiseBpropParams& d = p.depthwise;
  const ConvShape& s = d.shape = conv_shape(x, w_dw, geometry);
  STD_TORCH_CHECK(s.c_mid == s.c_in, "the chain has no depth multiplier");
  const ImageShape images{s.n, s.h, s.w, s.c_in};
  d.type = type_of(x, "x");
  image(r, x, "r", {s.n, s.p, s.q, c_out});
  d.x = image(x, x, "x", images);
  d.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  p.w_pw = contiguous(w_pw, x, "w_pw", static_cast<int64_t>(c_out) * s.c_in);
  d.prologue = load_of(vec, activation, alpha, x, s.c_in);
  d.epilogue = gradient_epilogue({shortcut, operand_1, operand_2, centres}, before_mask, x, images);
  Tensor dx = new_image(x, images);
  d.dx = dx.mutable_data_ptr();
  const DeviceScope device(x, p);
  const bool aligned =
      is_aligned(p.gradient) && is_aligned(d.x) && is_aligned(d.dx) && is_aligned(p.w_pw) && is_aligned(d.epilogue);
  p.plan = plan_chain_backward(s, c_out, element_bytes(d.type), aligned, device.properties(p));
  STD_TORCH_CHECK(p.plan.fused, "the planner does not fuse the backward of ", describe(p));
  const int64_t workers = p.plan.workers;
  Tensor partials = new_flat(x, {workers, bprop_partial_rows(s), s.c_in}, ScalarType::Float);
  Tensor dw_pw_partials = new_flat(x, {workers * p.plan.shares, c_out, s.c_in}, ScalarType::Float);
  Tensor dw_dw = new_flat(x, {s.c_in, 1, s.r, s.s}, ScalarType::Float);
  Tensor dw_pw = new_flat(x, {c_out, s.c_in}, ScalarType::Float);
  Tensor totals = new_flat(x, {d.epilogue.sums, s.c_in}, ScalarType::Float);
  d.partials = writable(partials), p.dw_pw_partials = writable(dw_pw_partials), p.dw_pw = writable(dw_pw);
  fused_backward(p, device.stream());
  SumPartialsParams sum{s, kFloat32, p.plan.workers, d.partials, dw_dw.mutable_data_ptr(), {}};
  for (int64_t k = 0; k < d.epilogue.sums; ++k) sum.vectors[k] = writable(totals) + k * s.c_in;
  sum_bprop_partials(sum, device.stream());
  return {dx, dw_dw, dw_pw, totals};
}

// (dr, dw_pw [C_out, C_in]). Only where the planner has a kernel for it, of tensors that start on 16 bytes.
std::tuple<Tensor, Tensor> cuda_chain_wgrad(Tensor du, Tensor r, Tensor coef, Tensor x, Tensor w_dw, OptionalTensor vec,
                                            Ints geometry, int64_t activation, double alpha) {
  ChainWgradParams p{};
  p.gradient = raw_gradient_of({du, std::nullopt, r, coef}, {});
  const ImageShape& raw = p.gradient.shape;
  SeparableFpropParams& layer = p.wgrad.layer;
  const ConvShape& s = layer.shape = conv_shape(x, w_dw, geometry);
  STD_TORCH_CHECK(s.c_mid == s.c_in, "the chain has no depth multiplier");
  layer.c_out = raw.c;
  layer.type = type_of(x, "x");
  image(r, x, "r", {s.n, s.p, s.q, raw.c});
  layer.x = image(x, x, "x", {s.n, s.h, s.w, s.c_in});
  layer.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  layer.prologue = load_of(vec, activation, alpha, x, s.c_in);
  Tensor dr = new_image(r, raw);
  p.gradient.dr = dr.mutable_data_ptr();
  const DeviceScope device(x, p);
  const bool aligned = is_aligned(p.gradient) && is_aligned(p.gradient.dr) && is_aligned(layer.x);
  const SeparableWgradPlan plan =
      kept_chain_wgrad_plan(s, raw.c, element_bytes(layer.type), aligned, device.properties(p));
  STD_TORCH_CHECK(plan.on_chip, "the planner has no kernel for dr and the pointwise weights' gradient of ",
                  describe(p));
  layer.plan = plan.walk, p.wgrad.split = plan.split, p.extras = plan.extras;
  const int64_t rows = static_cast<int64_t>(plan.walk.workers) * plan.split.shares;
  Tensor partials = new_flat(x, {rows, raw.c, s.c_in}, ScalarType::Float);
  Tensor dw_pw = new_flat(x, {raw.c, s.c_in}, ScalarType::Float);
  p.wgrad.partials = writable(partials), p.wgrad.dw_pw = writable(dw_pw);
  chain_wgrad(p, device.stream());
  return {dr, dw_pw};
}

}  // namespace
}  // namespace xsep::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(XSEP_NAMESPACE, m) {
  m.def(
      "cuda_chain_fused_backward(Tensor du, Tensor? taps, Tensor r, Tensor coef, int[] pads, Tensor w_pw, Tensor w_dw, "
      "Tensor x, Tensor? vec, Tensor? shortcut, Tensor? operand_1, Tensor? operand_2, Tensor? centres, "
      "bool before_mask, int[] geometry, int activation, float alpha) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_chain_wgrad(Tensor du, Tensor r, Tensor coef, Tensor x, Tensor w_dw, Tensor? vec, int[] geometry, "
      "int activation, float alpha) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, XSEP_DISPATCH_KEY, m) {
  m.impl("cuda_chain_fused_backward", TORCH_BOX(&xsep::cuda::cuda_chain_fused_backward));
  m.impl("cuda_chain_wgrad", TORCH_BOX(&xsep::cuda::cuda_chain_wgrad));
}
