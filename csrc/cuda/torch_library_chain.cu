// The training chain's own operators on PyTorch's stable ABI.
// xsep/backends/chain_cuda_launch.py brings tensors into the layouts that these ops ask for, and asks none for an empty
// tensor.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "chain/apply.h"
#include "chain/average.h"
#include "chain/finalize.h"
#include "chain/input_gradient.h"
#include "chain/pool_add.h"
#include "chain/raw_gradient.h"
#include "chain/statistics.h"
#include "chain/tensor.h"
#include "depthwise/bprop.h"
#include "device_scope.h"

namespace xsep::cuda {
namespace {

template <class Params>
void plan_for(Params& p, const DeviceScope& device, bool aligned, int ctas_per_sm, int64_t pixels) {
  p.plan = plan_images(pixels, p.shape.c, element_bytes(p.type), aligned, ctas_per_sm, device.properties(p));
}

Tensor cuda_chain_raw_gradient(Tensor du, OptionalTensor taps, Tensor r, Tensor coef, Ints pads) {
  RawGradientParams p = raw_gradient_of({du, taps, r, coef}, pads);
  Tensor dr = new_image(r, p.shape);
  p.dr = dr.mutable_data_ptr();
  const DeviceScope device(r, p);
  plan_for(p, device, is_aligned(p) && is_aligned(p.dr), kMapCtasPerSm, p.shape.pixels());
  raw_gradient(p, device.stream());
  return dr;
}

void check_counts(const Tensor& counts, const Tensor& x, int64_t tiles) {
  check_device(counts, x, "counts");
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Int && counts.is_contiguous() && counts.numel() == tiles,
                  "counts must be int32, one for each of ", tiles, " tiles");
}

// partials [T, 3, C] and counts [T] are written: of some of a batch's tiles, perhaps.
void cuda_chain_statistics(Tensor r, Tensor partials, Tensor counts) {
  StatisticsParams p{};
  const ImageShape& s = p.shape = image_shape(r, "r");
  p.type = type_of(r, "r");
  p.r = image(r, r, "r", s);
  const int64_t tiles = (s.pixels() + kStatisticsPixels - 1) / kStatisticsPixels;
  narrow(tiles, "tiles of the statistics");
  floats(partials, r, "partials", tiles * 3 * s.c);
  check_counts(counts, r, tiles);
  p.partials = writable(partials);
  p.counts = static_cast<int*>(counts.mutable_data_ptr());
  const DeviceScope device(r, p);
  plan_for(p, device, is_aligned(p.r), kMapCtasPerSm, s.pixels());
  tile_statistics(p, device.stream());
}

Tensor cuda_chain_apply(Tensor x, OptionalTensor residual, OptionalTensor vec, int64_t activation, double alpha) {
  ApplyParams p{};
  const ImageShape& s = p.shape = image_shape(x, "x");
  p.type = type_of(x, "x");
  p.x = image(x, x, "x", s);
  p.residual = optional_image(residual, x, "residual", s);
  p.load = load_of(vec, activation, alpha, x, s.c);
  Tensor y = new_image(x, s);
  p.y = y.mutable_data_ptr();
  const DeviceScope device(x, p);
  plan_for(p, device, is_aligned(p.x) && is_aligned(p.residual) && is_aligned(p.y), kMapCtasPerSm, s.pixels());
  apply_load(p, device.stream());
  return y;
}

// (dx, sums [1 + operands, C]); dx is e itself, and comes back empty, where nothing changes it.
std::tuple<Tensor, Tensor> cuda_chain_input_gradient(Tensor e, Tensor x, OptionalTensor residual,
                                                     OptionalTensor shortcut, OptionalTensor operand_1,
                                                     OptionalTensor operand_2, OptionalTensor centres,
                                                     OptionalTensor vec, bool before_mask, int64_t activation,
                                                     double alpha) {
  InputGradientParams p{};
  const ImageShape& s = p.shape = image_shape(x, "x");
  p.type = type_of(x, "x");
  p.e = image(e, x, "e", s);
  p.x = image(x, x, "x", s);
  p.residual = optional_image(residual, x, "residual", s);
  p.load = load_of(vec, activation, alpha, x, s.c);
  p.epilogue = gradient_epilogue({shortcut, operand_1, operand_2, centres}, before_mask, x, s);
  const bool changed = p.load.activation != Activation::kIdentity || p.epilogue.shortcut != nullptr;
  Tensor dx = changed ? new_image(x, s) : new_flat(x, {0}, x.scalar_type());
  p.dx = changed ? dx.mutable_data_ptr() : nullptr;
  const DeviceScope device(x, p);
  const bool aligned =
      is_aligned(p.e) && is_aligned(p.x) && is_aligned(p.residual) && is_aligned(p.dx) && is_aligned(p.epilogue);
  plan_for(p, device, aligned, kSumCtasPerSm, s.pixels());
  Tensor partials = new_flat(x, {p.plan.workers, p.epilogue.sums, s.c}, ScalarType::Float);
  Tensor sums = new_flat(x, {p.epilogue.sums, s.c}, ScalarType::Float);
  p.partials = writable(partials), p.sums = writable(sums);
  input_gradient(p, device.stream());
  return {dx, sums};
}

// One slice of a batch: dx is written, and the slice's own rows of partials [workers, R S + 3, C_in].
void cuda_chain_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw, OptionalTensor vec, OptionalTensor shortcut,
                                OptionalTensor operand_1, OptionalTensor operand_2, OptionalTensor centres,
                                bool before_mask, Ints geometry, int64_t activation, double alpha, Tensor dx,
                                Tensor partials) {
  DepthwiseBpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  STD_TORCH_CHECK(s.c_mid == s.c_in, "the chain has no depth multiplier");
  const ImageShape images{s.n, s.h, s.w, s.c_in};
  p.type = type_of(x, "x");
  p.dz = nhwc(dz, x, "dz", s.n, s.c_mid, s.p, s.q);
  p.x = image(x, x, "x", images);
  p.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  p.prologue = load_of(vec, activation, alpha, x, s.c_in);
  p.epilogue = gradient_epilogue({shortcut, operand_1, operand_2, centres}, before_mask, x, images);
  image(dx, x, "dx", images);
  p.dx = dx.mutable_data_ptr();
  const DeviceScope device(x, p);
  // A slice starts where its first picture does: on whole vectors where there are any, not always on 16 bytes.
  const int vector_bytes = bprop_vec(s.r) * element_bytes(p.type);
  const bool aligned = is_aligned(p.x, vector_bytes) && is_aligned(p.dz, vector_bytes) &&
                       is_aligned(p.dx, vector_bytes) && is_aligned(p.epilogue, vector_bytes);
  p.plan = plan_depthwise_bprop(s, element_bytes(p.type), aligned, device.properties(p));
  const int64_t rows = static_cast<int64_t>(p.plan.workers);
  floats(partials, x, "partials", rows * bprop_partial_rows(s) * s.c_mid);
  p.partials = writable(partials);
  depthwise_bprop_partials(p, device.stream());
}

// (dw_dw [C_in, 1, R, S], sums [sums, C_in]) of all slices' partials.
std::tuple<Tensor, Tensor> cuda_chain_sum_partials(Tensor partials, Tensor w_dw, int64_t sums) {
  SumPartialsParams p{};
  ConvShape& s = p.shape;
  STD_TORCH_CHECK(is_on_gpu(w_dw) && w_dw.dim() == 4 && w_dw.numel() > 0, "w_dw must be a CUDA tensor [C_in, 1, R, S]");
  STD_TORCH_CHECK(partials.dim() == 3 && partials.numel() > 0, "partials must be [rows, R S + 3, C_in]");
  STD_TORCH_CHECK(sums >= 1 && sums <= kMostGradientSums, "there are 1 to ", kMostGradientSums, " sums, not ", sums);
  s.c_in = s.c_mid = narrow(w_dw.size(0), "C_in");
  s.r = narrow(w_dw.size(2), "R"), s.s = narrow(w_dw.size(3), "S");
  p.type = kFloat32;
  p.rows = narrow(partials.size(0), "rows of partials");
  p.partials = floats(partials, w_dw, "partials", static_cast<int64_t>(p.rows) * bprop_partial_rows(s) * s.c_mid);
  Tensor dw_dw = new_flat(w_dw, {s.c_mid, 1, s.r, s.s}, ScalarType::Float);
  Tensor totals = new_flat(w_dw, {sums, s.c_in}, ScalarType::Float);
  p.dw_dw = dw_dw.mutable_data_ptr();
  for (int64_t k = 0; k < sums; ++k) p.vectors[k] = writable(totals) + k * s.c_in;
  const DeviceScope device(w_dw, p);
  sum_bprop_partials(p, device.stream());
  return {dw_dw, totals};
}

// (t, taps, r at the taps)
std::tuple<Tensor, Tensor, Tensor> cuda_chain_bn_pool_add(Tensor r, Tensor vec, Tensor s, Tensor vec_s, Ints pads) {
  PoolAddParams p{};
  p.shape = image_shape(r, "r");
  p.type = type_of(r, "r");
  p.r = image(r, r, "r", p.shape);
  p.vec = floats(vec, r, "vec", 2 * static_cast<int64_t>(p.shape.c));
  p.vec_s = floats(vec_s, r, "vec_s", 2 * static_cast<int64_t>(p.shape.c));
  const Windows windows(s, "s", p.shape, pads);
  p.s = image(s, r, "s", windows.shape);
  p.pooled_h = windows.shape.h, p.pooled_w = windows.shape.w;
  p.pad_top = windows.pad_top, p.pad_left = windows.pad_left;
  Tensor t = new_image(r, windows.shape), chosen = new_image(r, windows.shape);
  Tensor taps = new_tensor(r, {windows.shape.n, windows.shape.c, windows.shape.h, windows.shape.w}, ScalarType::Byte,
                           MemoryFormat::ChannelsLast);
  p.t = t.mutable_data_ptr(), p.chosen = chosen.mutable_data_ptr();
  p.taps = static_cast<uint8_t*>(taps.mutable_data_ptr());
  const DeviceScope device(r, p);
  const bool aligned =
      is_aligned(p.r) && is_aligned(p.s) && is_aligned(p.t) && is_aligned(p.taps) && is_aligned(p.chosen);
  plan_for(p, device, aligned, kMapCtasPerSm, windows.shape.pixels());
  pool_add(p, device.stream());
  return {t, taps, chosen};
}

// (mean of relu(u) [N, C], pixels above zero [N, C], sum of r over them [N, C])
std::tuple<Tensor, Tensor, Tensor> cuda_chain_bn_relu_gap(Tensor r, Tensor vec) {
  AverageParams p{};
  const ImageShape& s = p.shape = image_shape(r, "r");
  p.type = type_of(r, "r");
  p.r = image(r, r, "r", s);
  p.vec = floats(vec, r, "vec", 2 * static_cast<int64_t>(s.c));
  Tensor pooled = new_flat(r, {s.n, s.c}, r.scalar_type());
  Tensor positive = new_flat(r, {s.n, s.c}, ScalarType::Float), total = new_flat(r, {s.n, s.c}, ScalarType::Float);
  p.pooled = pooled.mutable_data_ptr();
  p.positive = writable(positive), p.total = writable(total);
  const DeviceScope device(r, p);
  plan_for(p, device, is_aligned(p.r), kMapCtasPerSm, s.pixels());
  relu_average(p, device.stream());
  return {pooled, positive, total};
}

// (du [N, C, H, W], sums [2, C])
std::tuple<Tensor, Tensor> cuda_chain_bn_relu_gap_backward(Tensor g, Tensor r, Tensor vec, Tensor mean, Tensor positive,
                                                           Tensor total) {
  AverageBackwardParams p{};
  const ImageShape& s = p.shape = image_shape(r, "r");
  const int64_t numel = static_cast<int64_t>(s.n) * s.c;
  p.type = type_of(r, "r");
  p.g = contiguous(g, r, "g", numel);
  p.r = image(r, r, "r", s);
  p.vec = floats(vec, r, "vec", 2 * static_cast<int64_t>(s.c));
  p.mean = floats(mean, r, "mean", s.c);
  p.positive = floats(positive, r, "positive", numel);
  p.total = floats(total, r, "total", numel);
  Tensor du = new_image(r, s), sums = new_flat(r, {2, s.c}, ScalarType::Float);
  p.du = du.mutable_data_ptr();
  p.sums = writable(sums);
  const DeviceScope device(r, p);
  plan_for(p, device, is_aligned(p.g) && is_aligned(p.r) && is_aligned(p.du), kMapCtasPerSm, s.pixels());
  relu_average_backward(p, device.stream());
  return {du, sums};
}

float* optional_floats(OptionalTensor& t, const Tensor& x, const char* name, int64_t numel) {
  if (!t.has_value()) return nullptr;
  floats(*t, x, name, numel);
  return writable(*t);
}

const double* double_scalar(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Double, name, " must be one float64");
  return static_cast<const double*>(t.const_data_ptr());
}

// (vec [2, C], the mean twice [2, C], invstd [C], count []); batches is counted up, running_mean and running_var are
// moved: by one over the batches where the average is cumulative.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_chain_bn_finalize(Tensor partials, Tensor counts, OptionalTensor gamma,
                                                                  OptionalTensor beta, OptionalTensor running_mean,
                                                                  OptionalTensor running_var, OptionalTensor batches,
                                                                  bool cumulative, double momentum, double eps) {
  FinalizeParams p{};
  STD_TORCH_CHECK(is_on_gpu(partials) && partials.dim() == 3 && partials.size(1) == 3 && partials.numel() > 0,
                  "partials must be a CUDA tensor [T, 3, C]");
  p.tiles = narrow(partials.size(0), "tiles of the statistics"), p.channels = narrow(partials.size(2), "C");
  p.partials = floats(partials, partials, "partials", partials.numel());
  check_counts(counts, partials, p.tiles);
  p.counts = static_cast<const int*>(counts.const_data_ptr());
  p.gamma = optional_floats(gamma, partials, "gamma", p.channels);
  p.beta = optional_floats(beta, partials, "beta", p.channels);
  p.running_mean = optional_floats(running_mean, partials, "running_mean", p.channels);
  p.running_var = optional_floats(running_var, partials, "running_var", p.channels);
  STD_TORCH_CHECK((p.running_mean == nullptr) == (p.running_var == nullptr), "the running statistics come together");
  if (batches.has_value()) {
    check_device(*batches, partials, "batches");
    STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1, "batches must be one int64");
    p.batches = static_cast<int64_t*>(batches->mutable_data_ptr());
  }
  p.cumulative = cumulative ? 1 : 0;
  STD_TORCH_CHECK(!cumulative || p.batches != nullptr, "a cumulative average needs batches");
  p.momentum = momentum, p.eps = eps;
  p.groups = merge_groups(p.tiles);
  Tensor merged = new_flat(partials, {p.groups, 3, p.channels}, ScalarType::Double);
  Tensor vec = new_flat(partials, {2, p.channels}, ScalarType::Float);
  Tensor centres = new_flat(partials, {2, p.channels}, ScalarType::Float);
  Tensor invstd = new_flat(partials, {p.channels}, ScalarType::Float);
  Tensor count = new_flat(partials, {}, ScalarType::Double);
  p.merged = static_cast<double*>(merged.mutable_data_ptr());
  p.vec = writable(vec), p.centres = writable(centres), p.invstd = writable(invstd);
  p.count = static_cast<double*>(count.mutable_data_ptr());
  const DeviceScope device(partials, p);
  bn_finalize(p, device.stream());
  return {vec, centres, invstd, count};
}

// (coef [3, C], dgamma [C], dbeta [C])
std::tuple<Tensor, Tensor, Tensor> cuda_chain_bn_backward_finalize(Tensor sums, Tensor mean, Tensor invstd,
                                                                   OptionalTensor gamma, Tensor count, bool batch) {
  BackwardFinalizeParams p{};
  STD_TORCH_CHECK(is_on_gpu(sums) && sums.dim() == 2 && sums.size(0) == 2 && sums.numel() > 0,
                  "sums must be a CUDA tensor [2, C]");
  p.channels = narrow(sums.size(1), "C");
  p.batch = batch ? 1 : 0;
  p.sums = floats(sums, sums, "sums", sums.numel());
  p.mean = floats(mean, sums, "mean", p.channels);
  p.invstd = floats(invstd, sums, "invstd", p.channels);
  p.gamma = optional_floats(gamma, sums, "gamma", p.channels);
  p.count = double_scalar(count, sums, "count");
  Tensor coef = new_flat(sums, {3, p.channels}, ScalarType::Float);
  Tensor dgamma = new_flat(sums, {p.channels}, ScalarType::Float),
         dbeta = new_flat(sums, {p.channels}, ScalarType::Float);
  p.coef = writable(coef), p.dgamma = writable(dgamma), p.dbeta = writable(dbeta);
  const DeviceScope device(sums, p);
  bn_backward_finalize(p, device.stream());
  return {coef, dgamma, dbeta};
}

}  // namespace
}  // namespace xsep::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(XSEP_NAMESPACE, m) {
  m.def("cuda_chain_raw_gradient(Tensor du, Tensor? taps, Tensor r, Tensor coef, int[] pads) -> Tensor");
  m.def("cuda_chain_statistics(Tensor r, Tensor(a!) partials, Tensor(b!) counts) -> ()");
  m.def("cuda_chain_apply(Tensor x, Tensor? residual, Tensor? vec, int activation, float alpha) -> Tensor");
  m.def(
      "cuda_chain_input_gradient(Tensor e, Tensor x, Tensor? residual, Tensor? shortcut, Tensor? operand_1, "
      "Tensor? operand_2, Tensor? centres, Tensor? vec, bool before_mask, int activation, float alpha) "
      "-> (Tensor, Tensor)");
  m.def("cuda_chain_bn_pool_add(Tensor r, Tensor vec, Tensor s, Tensor vec_s, int[] pads) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_chain_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw, Tensor? vec, Tensor? shortcut, Tensor? operand_1, "
      "Tensor? operand_2, Tensor? centres, bool before_mask, int[] geometry, int activation, float alpha, "
      "Tensor(a!) dx, Tensor(b!) partials) -> ()");
  m.def("cuda_chain_sum_partials(Tensor partials, Tensor w_dw, int sums) -> (Tensor, Tensor)");
  m.def(
      "cuda_chain_bn_finalize(Tensor partials, Tensor counts, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? batches, bool cumulative, float momentum, float eps) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "cuda_chain_bn_backward_finalize(Tensor sums, Tensor mean, Tensor invstd, Tensor? gamma, Tensor count, bool "
      "batch) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("cuda_chain_bn_relu_gap(Tensor r, Tensor vec) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_chain_bn_relu_gap_backward(Tensor g, Tensor r, Tensor vec, Tensor mean, Tensor positive, Tensor total) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, XSEP_DISPATCH_KEY, m) {
  m.impl("cuda_chain_raw_gradient", TORCH_BOX(&xsep::cuda::cuda_chain_raw_gradient));
  m.impl("cuda_chain_statistics", TORCH_BOX(&xsep::cuda::cuda_chain_statistics));
  m.impl("cuda_chain_apply", TORCH_BOX(&xsep::cuda::cuda_chain_apply));
  m.impl("cuda_chain_input_gradient", TORCH_BOX(&xsep::cuda::cuda_chain_input_gradient));
  m.impl("cuda_chain_bn_pool_add", TORCH_BOX(&xsep::cuda::cuda_chain_bn_pool_add));
  m.impl("cuda_chain_depthwise_bprop", TORCH_BOX(&xsep::cuda::cuda_chain_depthwise_bprop));
  m.impl("cuda_chain_sum_partials", TORCH_BOX(&xsep::cuda::cuda_chain_sum_partials));
  m.impl("cuda_chain_bn_finalize", TORCH_BOX(&xsep::cuda::cuda_chain_bn_finalize));
  m.impl("cuda_chain_bn_backward_finalize", TORCH_BOX(&xsep::cuda::cuda_chain_bn_backward_finalize));
  m.impl("cuda_chain_bn_relu_gap", TORCH_BOX(&xsep::cuda::cuda_chain_bn_relu_gap));
  m.impl("cuda_chain_bn_relu_gap_backward", TORCH_BOX(&xsep::cuda::cuda_chain_bn_relu_gap_backward));
}
