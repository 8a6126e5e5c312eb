// The depthwise kernels on PyTorch's tensors.
#pragma once

#include <tuple>

#include "../chain/statistics.h"
#include "../device_scope.h"
#include "../tensor.h"
#include "bprop.h"
#include "fprop.h"

namespace xsep::cuda {

using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

struct Statistics {
  Tensor partials, counts;  // [tiles, 3, C] and [tiles], without elements where not asked for

  explicit Statistics(const Tensor& x, int64_t tiles = 0, int64_t channels = 0)
      : partials(new_flat(x, {tiles, 3, channels}, ScalarType::Float)), counts(new_flat(x, {tiles}, ScalarType::Int)) {}

  float* floats() { return static_cast<float*>(partials.mutable_data_ptr()); }
  int* ints() { return static_cast<int*>(counts.mutable_data_ptr()); }
};

// Statistics of y behind a kernel that leaves none.
inline void take_statistics(const DepthwiseFpropParams& p, Statistics& found, const DeviceScope& device) {
  const ConvShape& s = p.shape;
  StatisticsParams of_y{};
  of_y.shape = {s.n, s.p, s.q, s.c_mid};
  of_y.type = p.type;
  of_y.r = p.y;
  of_y.partials = found.floats(), of_y.counts = found.ints();
  of_y.plan = plan_images(of_y.shape.pixels(), s.c_mid, element_bytes(p.type), is_aligned(p.y), kMapCtasPerSm,
                          device.properties(p));
  tile_statistics(of_y, device.stream());
}

// statistics: null where they are not wanted.
inline Tensor run_depthwise_fprop(DepthwiseFpropParams p, const Tensor& x, const Tensor& w_dw,
                                  const OptionalTensor& scale_p, const OptionalTensor& shift_p,
                                  const OptionalTensor& scale_e, const OptionalTensor& shift_e, const Ints& activations,
                                  const Doubles& alphas, Statistics* statistics = nullptr) {
  STD_TORCH_CHECK(activations.size() == 2 && alphas.size() == 2, "two activations and alphas: prologue, epilogue");
  const ConvShape& s = p.shape;
  p.type = type_of(x, "x");
  p.x = nhwc(x, x, "x", s.n, s.c_in, s.h, s.w);
  p.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  p.prologue = channel_affine(scale_p, shift_p, activations[0], alphas[0], x, {"scale_p", "shift_p"}, s.c_in);
  p.epilogue = channel_affine(scale_e, shift_e, activations[1], alphas[1], x, {"scale_e", "shift_e"}, s.c_mid);
  Tensor y = new_nhwc(x, s.n, s.c_mid, s.p, s.q);
  p.y = y.mutable_data_ptr();
  const DeviceScope device(x, p);
  // A slice of a batch starts where its first picture does: on whole vectors, not always on 16 bytes.
  const int vector_bytes = kFpropVec * element_bytes(p.type);
  const bool aligned = is_aligned(p.x, vector_bytes) && is_aligned(p.y, vector_bytes) &&
                       is_aligned(p.residual, vector_bytes) && is_aligned(p.x_pre, vector_bytes);
  p.plan = plan_depthwise_fprop(s, element_bytes(p.type), aligned, device.properties(p));
  if (statistics == nullptr) {
    depthwise_fprop(p, device.stream());
    return y;
  }
  *statistics = Statistics(x, narrow(fprop_statistics_tiles(p.plan, s), "tiles of the statistics"), s.c_mid);
  if (p.plan.sliding_window) {
    narrow(most_pixels_of_a_worker(p.plan, s), "pixels of a tile of the statistics");
    p.statistics = statistics->floats(), p.counts = statistics->ints();
  }
  depthwise_fprop(p, device.stream());
  if (!p.plan.sliding_window) take_statistics(p, *statistics, device);
  return y;
}

// dx, dw_dw, dscale_p, dshift_p; what is not wanted comes back empty.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> run_depthwise_bprop(
    const Tensor& dz, const Tensor& x, const Tensor& w_dw, const OptionalTensor& scale_p, const OptionalTensor& shift_p,
    const OptionalTensor& centre, const Ints& geometry, int64_t activation, double alpha, const Ints& wanted) {
  STD_TORCH_CHECK(wanted.size() == 4, "wanted must hold 4 flags: dx, dw_dw, dscale_p, dshift_p");
  DepthwiseBpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  p.type = type_of(x, "x");
  p.dz = nhwc(dz, x, "dz", s.n, s.c_mid, s.p, s.q);
  p.x = nhwc(x, x, "x", s.n, s.c_in, s.h, s.w);
  p.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  p.prologue = channel_affine(scale_p, shift_p, activation, alpha, x, {"scale_p", "shift_p"}, s.c_in);
  const ChannelVector centres = channel_vector(centre, x, "centre", s.c_in);
  STD_TORCH_CHECK(centres.data == nullptr || centres.is_float32 != 0, "centre must be float32");
  p.centre = static_cast<const float*>(centres.data);

  const auto vector = [&](bool needed) { return new_flat(x, {needed ? s.c_in : 0}, ScalarType::Float); };
  Tensor dx = wanted[0] ? new_nhwc(x, s.n, s.c_in, s.h, s.w) : new_flat(x, {0}, x.scalar_type());
  Tensor dw_dw = wanted[1] ? new_flat(x, {s.c_mid, 1, s.r, s.s}, x.scalar_type()) : new_flat(x, {0}, x.scalar_type());
  Tensor dscale = vector(wanted[2] != 0), dshift = vector(wanted[3] != 0);
  p.dx = wanted[0] ? dx.mutable_data_ptr() : nullptr;
  p.dw_dw = wanted[1] ? dw_dw.mutable_data_ptr() : nullptr;
  p.dscale = wanted[2] ? static_cast<float*>(dscale.mutable_data_ptr()) : nullptr;
  p.dshift = wanted[3] ? static_cast<float*>(dshift.mutable_data_ptr()) : nullptr;

  const DeviceScope device(x, p);
  const int vector_bytes = bprop_vec(s.r) * element_bytes(p.type);
  const bool aligned =
      is_aligned(p.x, vector_bytes) && is_aligned(p.dz, vector_bytes) && is_aligned(p.dx, vector_bytes);
  p.plan = plan_depthwise_bprop(s, element_bytes(p.type), aligned, device.properties(p));
  Tensor partials = new_flat(x, {p.plan.workers, bprop_partial_rows(s), s.c_mid}, ScalarType::Float);
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  depthwise_bprop(p, device.stream());
  return {dx, dw_dw, dscale, dshift};
}

}  // namespace xsep::cuda
