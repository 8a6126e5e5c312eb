// The operators xsep::cpu_depthwise_fprop and xsep::cpu_depthwise_bprop.
#include <torch/library.h>

#include "depthwise_bprop_op.h"
#include "glue.h"
#include "planes.h"

namespace xsep::cpu {
namespace {

/// x and y in NCHW, plane by plane.
void depthwise_fprop_of_planes(const Tensor& x, const Tensor& w_dw, const DepthwiseShape& shape,
                               const ChannelAffine& prologue, const ChannelAffine& epilogue, Tensor& y) {
  const Tensor planes = x.contiguous(), w = w_dw.to(at::kFloat).contiguous();
  PlaneFprop p{};
  p.shape = shape;
  p.plan = plan_cpu_planes(shape, at::get_num_threads());
  p.rows = plane_rows(shape, p.plan);
  p.x = planes.const_data_ptr();
  p.w = w.const_data_ptr<float>();
  p.prologue = prologue;
  p.output = epilogue;
  p.y = y.mutable_data_ptr();
  const int64_t thread_bytes = round_up(p.scratch_bytes(), 64);
  const Tensor scratch = empty_bytes(thread_bytes * at::get_num_threads());
  at::parallel_for(0, p.plan.units(), 1, [&](int64_t begin, int64_t end) {
    char* const mine = static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * thread_bytes;
    std::fill(mine, mine + thread_bytes, char{0});
    with_storage(x.scalar_type(), [&](auto t) {
      for (int64_t unit = begin; unit < end; ++unit) plane_fprop_unit<decltype(t)>(p, unit, mine);
    });
  });
}

/// nchw: y is wanted in that layout, else it is in NHWC. Planes that are long enough are stored tile by tile.
Tensor depthwise_fprop(const Tensor& x, const Tensor& w_dw, const OptionalTensor& scale_p,
                       const OptionalTensor& shift_p, const OptionalTensor& scale_e, const OptionalTensor& shift_e,
                       at::IntArrayRef geometry, at::IntArrayRef activations, at::ArrayRef<double> alphas, bool nchw) {
  const DepthwiseShape shape = checked_shape(x, w_dw, geometry);
  TORCH_CHECK(activations.size() == 2 && alphas.size() == 2, "expected 2 activations and 2 alphas");
  const int64_t c_mid = shape.c * shape.multiplier;
  if (cpu_takes_planes(shape, nchw, kLanes)) {
    Tensor y = empty_image({shape.n, c_mid, shape.p, shape.q}, x, nchw);
    if (shape.n == 0) return y;
    const AffineBuffers prologue(scale_p, shift_p, shape.c, 1, shape.c, activations[0], alphas[0]);
    const AffineBuffers epilogue(scale_e, shift_e, c_mid, 1, c_mid, activations[1], alphas[1]);
    depthwise_fprop_of_planes(x, w_dw, shape, prologue.affine(), epilogue.affine(), y);
    return y;
  }
  const bool planes = nchw && stores_planes(shape);
  Tensor y = empty_image({shape.n, c_mid, shape.p, shape.q}, x, planes);
  if (shape.n == 0) return y;
  DepthwiseInputs inputs(x, w_dw, scale_p, shift_p, activations[0], alphas[0], shape, 1);
  const AffineBuffers epilogue(scale_e, shift_e, shape.c, shape.multiplier, inputs.params.c_pad, activations[1],
                               alphas[1]);
  inputs.params.output = epilogue.affine();
  const CpuDepthwisePlan plan = plan_cpu_depthwise(shape, at::get_num_threads());
  const int64_t step = planes ? std::min(plan.plane_pixels, plan.run_pixels) : plan.run_pixels;

  char* out = static_cast<char*>(y.mutable_data_ptr());
  const int64_t pixel_bytes = c_mid * y.element_size();
  const bool in_passes = shape.multiplier > 1;
  const int64_t passes_bytes = in_passes ? round_up(step * c_mid * static_cast<int64_t>(sizeof(float)), 64) : 0;
  const int64_t tile_bytes = planes ? round_up(step * pixel_bytes, 64) : 0;
  const int64_t thread_bytes = passes_bytes + tile_bytes + inputs.params.input.bytes();
  const Tensor scratch = empty_bytes(thread_bytes * at::get_num_threads());
  at::parallel_for(0, plan.tasks, 1, [&](int64_t begin, int64_t end) {
    char* mine = static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * thread_bytes;
    char* const tile = mine + passes_bytes;
    RowWindow window(inputs.params.input, tile + tile_bytes);
    const int64_t last = std::min(end * plan.run_pixels, shape.pixels_out());
    for (int64_t pixel = begin * plan.run_pixels; pixel < last; pixel += step) {
      const Range pixels{pixel, std::min(pixel + step, last)};
      char* to = planes ? tile : out + pixel * pixel_bytes;
      const RunOutput run = in_passes ? RunOutput{mine, c_mid, Storage::kFloat, 0}
                                      : RunOutput{to, c_mid, storage_of(y.scalar_type()), planes ? 0 : shape.q * c_mid};
      with_storage(inputs.dtype(),
                   [&](auto t) { depthwise_fprop_run<decltype(t)>(inputs.params, pixels, {0, shape.c}, run, window); });
      with_storage(y.scalar_type(), [&](auto t) {
        using T = decltype(t);
        if (in_passes) {
          interleave_passes(reinterpret_cast<const float*>(mine), pixels.end - pixels.begin, shape.c, shape.multiplier,
                            reinterpret_cast<T*>(to));
        }
        if (!planes) return;
        const Planes<T> all{reinterpret_cast<T*>(out), c_mid, shape.p * shape.q};
        pixels_to_planes(reinterpret_cast<const T*>(tile), c_mid, all, pixels, {0, c_mid});
      });
    }
  });
  return nchw && !planes ? to_nchw(y) : y;
}

/// [N, C * m, P, Q] -> the same values as NHWC with each pixel's channels in the order of passes.
Tensor in_pass_order(const Tensor& dz, const DepthwiseShape& s) {
  const Tensor rows = to_nhwc(dz);
  if (s.multiplier == 1) return rows;
  return rows.permute({0, 2, 3, 1}).reshape({s.n, s.p, s.q, s.c, s.multiplier}).transpose(3, 4).contiguous();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_bprop(const Tensor& dz, const Tensor& x, const Tensor& w_dw,
                                                           const OptionalTensor& scale_p, const OptionalTensor& shift_p,
                                                           at::IntArrayRef geometry, int64_t activation, double alpha,
                                                           std::array<bool, 4> wanted, bool nchw,
                                                           at::ScalarType dw_dtype, GradientOf dx_of) {
  const DepthwiseShape shape = checked_shape(x, w_dw, geometry);
  const int64_t c_mid = shape.c * shape.multiplier;
  check_input(dz, x.scalar_type(), 4, "dz");
  TORCH_CHECK(dz.size(0) == shape.n && dz.size(1) == c_mid && dz.size(2) == shape.p && dz.size(3) == shape.q,
              "dz must be ", at::IntArrayRef({shape.n, c_mid, shape.p, shape.q}), ", but is ", dz.sizes());
  const auto floats = at::TensorOptions().dtype(at::kFloat);
  const auto doubles = at::TensorOptions().dtype(at::kDouble);
  const bool affine_wanted = wanted[2] || wanted[3];
  const bool in_units = cpu_turns_in_units(shape);
  Tensor dx = wanted[0] ? empty_image(x.sizes(), x, nchw && in_units) : at::empty({0}, x.options());
  Tensor dw = at::empty(wanted[1] ? w_dw.sizes() : at::IntArrayRef({0}), w_dw.options().dtype(dw_dtype));
  Tensor dscale = at::empty({wanted[2] ? shape.c : 0}, floats);
  Tensor dshift = at::empty({wanted[3] ? shape.c : 0}, floats);
  if (shape.n == 0) return {dx, dw.zero_(), dscale.zero_(), dshift.zero_()};
  if (!wanted[0] && !wanted[1] && !affine_wanted) return {dx, dw, dscale, dshift};

  DepthwiseBprop p{};
  p.shape = shape;
  p.plan = plan_cpu_backward(shape);
  p.c_pad = table_row(shape.c);
  const Tensor image = in_units && is_nchw(x) ? x : to_nhwc(x);
  const Tensor dz_rows = in_pass_order(dz, shape);
  const Tensor w = packed_depthwise(w_dw, shape, p.c_pad);
  const AffineBuffers prologue(scale_p, shift_p, shape.c, 1, p.c_pad, activation, alpha);
  const int64_t taps = shape.multiplier * shape.taps();
  Tensor dw_partial, daffine_partial;
  p.x = image.const_data_ptr();
  p.x_planes = is_nchw(image);
  p.dz = dz_rows.const_data_ptr();
  p.w = w.const_data_ptr<float>();
  p.prologue = prologue.affine();
  if (wanted[0]) p.dx = dx.mutable_data_ptr();
  p.dx_planes = wanted[0] && is_nchw(dx);
  p.dx_of = dx_of;
  if (wanted[1] || DepthwiseBprop::makes_all(shape)) {
    dw_partial = at::empty({p.plan.row_groups, taps, p.c_pad}, doubles);
    p.dw = dw_partial.mutable_data_ptr<double>();
  }
  if (affine_wanted) {
    daffine_partial = at::empty({p.plan.row_groups, 2, p.c_pad}, doubles);
    p.daffine = daffine_partial.mutable_data_ptr<double>();
  }
  const int64_t thread_bytes = p.scratch_bytes(x.element_size());
  const Tensor scratch = empty_bytes(thread_bytes * at::get_num_threads());
  at::parallel_for(0, p.plan.units(), 1, [&](int64_t begin, int64_t end) {
    char* const mine = static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * thread_bytes;
    for (int64_t unit = begin; unit < end; ++unit) {
      with_storage(x.scalar_type(), [&](auto t) { depthwise_bprop_unit<decltype(t)>(p, unit, mine); });
    }
  });

  const Tensor sums = at::empty({std::max<int64_t>(taps, 2), p.c_pad}, doubles);
  double* sum = sums.mutable_data_ptr<double>();
  if (wanted[1]) {
    at::parallel_for(0, ceil_div(shape.c, 64), 1, [&](int64_t begin, int64_t end) {
      const Range channels{begin * 64, std::min(end * 64, shape.c)};
      reduce_partials(p.dw, p.plan.row_groups, taps, p.c_pad, channels, sum);
      with_storage(dw.scalar_type(), [&](auto t) {
        using T = decltype(t);
        unpack_depthwise(sum, channels, shape.multiplier, shape.taps(), p.c_pad,
                         static_cast<T*>(dw.mutable_data_ptr()));
      });
    });
  }
  if (p.daffine) {
    reduce_partials(p.daffine, p.plan.row_groups, 2, p.c_pad, {0, shape.c}, sum);
    for (int64_t i : {0, 1}) {
      if (!wanted[2 + i]) continue;
      float* out = (i == 0 ? dscale : dshift).mutable_data_ptr<float>();
      std::copy(sum + i * p.c_pad, sum + i * p.c_pad + shape.c, out);
    }
  }
  return {nchw && wanted[0] ? to_nchw(dx) : dx, dw, dscale, dshift};
}

namespace {

/// dx in the layout that PyTorch's convolution would give it.
std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_bprop_alone(const Tensor& dz, const Tensor& x, const Tensor& w_dw,
                                                                 const OptionalTensor& scale_p,
                                                                 const OptionalTensor& shift_p,
                                                                 at::IntArrayRef geometry, int64_t activation,
                                                                 double alpha, std::array<bool, 4> wanted) {
  return depthwise_bprop(dz, x, w_dw, scale_p, shift_p, geometry, activation, alpha, wanted, !wants_nhwc({x, w_dw}),
                         w_dw.scalar_type());
}

/// As the training chain has it: dx in NHWC, the gradient of scale * x + shift, or of what the convolution read where
/// something is still to be added to it; dw in float32.
std::tuple<Tensor, Tensor> chain_depthwise_bprop(const Tensor& dz, const Tensor& x, const Tensor& w_dw,
                                                 const OptionalTensor& scale_p, const OptionalTensor& shift_p,
                                                 at::IntArrayRef geometry, int64_t activation, double alpha,
                                                 bool of_loaded) {
  const GradientOf dx_of = of_loaded ? GradientOf::kLoaded : GradientOf::kU;
  auto [dx, dw, dscale, dshift] = depthwise_bprop(dz, x, w_dw, scale_p, shift_p, geometry, activation, alpha,
                                                  {true, true, false, false}, false, at::kFloat, dx_of);
  return {dx, dw};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def(
      "cpu_depthwise_fprop(Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, Tensor? scale_e, Tensor? shift_e, "
      "int[] geometry, int[] activations, float[] alphas, bool nchw=False) -> Tensor");
  m.def(
      "cpu_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, int[] geometry, "
      "int activation, float alpha, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cpu_chain_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, int[] geometry, "
      "int activation, float alpha, bool of_loaded) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) {
  m.impl("cpu_depthwise_fprop", &depthwise_fprop);
  m.impl("cpu_depthwise_bprop", &depthwise_bprop_alone);
  m.impl("cpu_chain_depthwise_bprop", &chain_depthwise_bprop);
}

}  // namespace xsep::cpu
