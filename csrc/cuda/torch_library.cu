// The operators of xsep/_C_cuda.so on PyTorch's stable ABI. xsep/backends/cuda.py brings tensors into the layouts that
// these ops ask for, and asks none for an empty tensor.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "chain/statistics.h"
#include "depthwise/bprop.h"
#include "depthwise/fprop.h"
#include "device_scope.h"
#include "separable/fprop.h"
#include "tensor.h"

namespace xsep::cuda {
namespace {

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
void take_statistics(const DepthwiseFpropParams& p, Statistics& found, const DeviceScope& device) {
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
Tensor run_depthwise_fprop(DepthwiseFpropParams p, const Tensor& x, const Tensor& w_dw, const OptionalTensor& scale_p,
                           const OptionalTensor& shift_p, const OptionalTensor& scale_e, const OptionalTensor& shift_e,
                           const Ints& activations, const Doubles& alphas, Statistics* statistics = nullptr) {
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
  const bool aligned = is_aligned(p.x) && is_aligned(p.y) && is_aligned(p.residual) && is_aligned(p.x_pre);
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

Tensor cuda_depthwise_fprop(Tensor x, Tensor w_dw, OptionalTensor scale_p, OptionalTensor shift_p,
                            OptionalTensor scale_e, OptionalTensor shift_e, Ints geometry, Ints activations,
                            Doubles alphas) {
  DepthwiseFpropParams p{};
  p.shape = conv_shape(x, w_dw, geometry);
  return run_depthwise_fprop(p, x, w_dw, scale_p, shift_p, scale_e, shift_e, activations, alphas);
}

// x_pre is written: a slice of a whole batch's, perhaps.
Tensor cuda_depthwise_fprop_residual(Tensor x, Tensor w_dw, Tensor residual, OptionalTensor scale_p,
                                     OptionalTensor shift_p, OptionalTensor scale_e, OptionalTensor shift_e,
                                     Ints geometry, Ints activations, Doubles alphas, Tensor x_pre) {
  DepthwiseFpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  p.residual = nhwc(residual, x, "residual", s.n, s.c_in, s.h, s.w);
  nhwc(x_pre, x, "x_pre", s.n, s.c_in, s.h, s.w);
  p.x_pre = x_pre.mutable_data_ptr();
  return run_depthwise_fprop(p, x, w_dw, scale_p, shift_p, scale_e, shift_e, activations, alphas);
}

// A depthwise layer that ends in a raw output: (y, statistics [tiles, 3, C_mid], counts [tiles], x_pre), of the rounded
// y. The last three have no elements where there are no statistics or no residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_depthwise_fprop_chain(Tensor x, OptionalTensor residual, Tensor w_dw,
                                                                      OptionalTensor scale_p, OptionalTensor shift_p,
                                                                      OptionalTensor scale_e, OptionalTensor shift_e,
                                                                      Ints geometry, Ints activations, Doubles alphas,
                                                                      bool with_statistics) {
  DepthwiseFpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  Tensor x_pre = residual.has_value() ? new_nhwc(x, s.n, s.c_in, s.h, s.w) : new_flat(x, {0}, x.scalar_type());
  if (residual.has_value()) {
    p.residual = nhwc(*residual, x, "residual", s.n, s.c_in, s.h, s.w);
    p.x_pre = x_pre.mutable_data_ptr();
  }
  Statistics found(x);
  Tensor y = run_depthwise_fprop(p, x, w_dw, scale_p, shift_p, scale_e, shift_e, activations, alphas,
                                 with_statistics ? &found : nullptr);
  return {y, found.partials, found.counts, x_pre};
}

// dx, dw_dw, dscale_p, dshift_p; what is not wanted comes back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw,
                                                                OptionalTensor scale_p, OptionalTensor shift_p,
                                                                OptionalTensor centre, Ints geometry,
                                                                int64_t activation, double alpha, Ints wanted) {
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
  const bool aligned = is_aligned(p.x) && is_aligned(p.dz) && is_aligned(p.dx);
  p.plan = plan_depthwise_bprop(s, element_bytes(p.type), aligned, device.properties(p));
  Tensor partials = new_flat(x, {p.plan.workers, bprop_partial_rows(s), s.c_mid}, ScalarType::Float);
  p.partials = static_cast<float*>(partials.mutable_data_ptr());
  depthwise_bprop(p, device.stream());
  return {dx, dw_dw, dscale, dshift};
}

struct SeparableOutputs {
  Tensor y;
  Tensor statistics, counts;  // without elements where not asked for
};

// What of p is neither x, the filters nor an output has been filled in before.
SeparableOutputs run_separable_fprop(SeparableFpropParams p, const Tensor& x, const Tensor& w_dw, const Tensor& w_pw,
                                     bool with_statistics) {
  const ConvShape& s = p.shape;
  p.type = type_of(x, "x");
  p.x = nhwc(x, x, "x", s.n, s.c_in, s.h, s.w);
  p.w_dw = contiguous(w_dw, x, "w_dw", static_cast<int64_t>(s.c_mid) * s.r * s.s);
  p.w_pw = contiguous(w_pw, x, "w_pw", static_cast<int64_t>(p.c_out) * s.c_mid);
  Tensor y = new_nhwc(x, s.n, p.c_out, s.p, s.q);
  p.y = y.mutable_data_ptr();

  const DeviceScope device(x, p);
  const bool aligned = is_aligned(p.x) && is_aligned(p.w_pw) && is_aligned(p.y) && is_aligned(p.residual) &&
                       is_aligned(p.addend) && is_aligned(p.x_pre);
  p.plan = kept_separable_plan(s, p.c_out, element_bytes(p.type), aligned, device.properties(p));
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

SeparableFpropParams separable_params(const Tensor& x, const Tensor& w_dw, const Tensor& w_pw, const Ints& geometry,
                                      bool allow_tf32) {
  SeparableFpropParams p{};
  p.shape = conv_shape(x, w_dw, geometry);
  STD_TORCH_CHECK(p.shape.c_mid == p.shape.c_in, "the fused kernel has no depth multiplier");
  STD_TORCH_CHECK(w_pw.dim() == 4 && w_pw.size(0) > 0, "w_pw must be [C_out, C_mid, 1, 1]");
  p.c_out = narrow(w_pw.size(0), "C_out");
  p.allow_tf32 = allow_tf32 ? 1 : 0;
  return p;
}

Tensor cuda_separable_fprop(Tensor x, Tensor w_dw, Tensor w_pw, OptionalTensor bias, OptionalTensor residual,
                            OptionalTensor scale_p, OptionalTensor shift_p, OptionalTensor scale_m,
                            OptionalTensor shift_m, OptionalTensor scale_e, OptionalTensor shift_e, Ints geometry,
                            Ints activations, Doubles alphas, bool allow_tf32) {
  STD_TORCH_CHECK(activations.size() == 3 && alphas.size() == 3,
                  "three activations and alphas: prologue, middle, epilogue");
  SeparableFpropParams p = separable_params(x, w_dw, w_pw, geometry, allow_tf32);
  const ConvShape& s = p.shape;
  if (residual.has_value()) p.residual = nhwc(*residual, x, "residual", s.n, p.c_out, s.p, s.q);
  p.bias = channel_vector(bias, x, "bias", p.c_out);
  p.prologue = channel_affine(scale_p, shift_p, activations[0], alphas[0], x, {"scale_p", "shift_p"}, s.c_in);
  p.middle = channel_affine(scale_m, shift_m, activations[1], alphas[1], x, {"scale_m", "shift_m"}, s.c_mid);
  p.epilogue = channel_affine(scale_e, shift_e, activations[2], alphas[2], x, {"scale_e", "shift_e"}, p.c_out);
  return run_separable_fprop(p, x, w_dw, w_pw, false).y;
}

// A layer of the training chain: (r, statistics [tiles, 3, C_out], counts [tiles], x_pre). The last three have no
// elements where there are no statistics or no addend.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_separable_fprop_chain(Tensor x, OptionalTensor addend, Tensor w_dw,
                                                                      Tensor w_pw, OptionalTensor scale_p,
                                                                      OptionalTensor shift_p, Ints geometry,
                                                                      int64_t activation, double alpha, bool allow_tf32,
                                                                      bool with_statistics) {
  SeparableFpropParams p = separable_params(x, w_dw, w_pw, geometry, allow_tf32);
  const ConvShape& s = p.shape;
  p.prologue = channel_affine(scale_p, shift_p, activation, alpha, x, {"scale_p", "shift_p"}, s.c_in);
  Tensor x_pre = addend.has_value() ? new_nhwc(x, s.n, s.c_in, s.h, s.w) : new_flat(x, {0}, x.scalar_type());
  if (addend.has_value()) {
    STD_TORCH_CHECK(
        s.stride_h == 1 && s.stride_w == 1 && s.pad_top == s.r / 2 && s.pad_left == s.s / 2 && s.p == s.h && s.q == s.w,
        "an addend needs stride 1 and padding that keeps the size");
    p.addend = nhwc(*addend, x, "addend", s.n, s.c_in, s.h, s.w);
    p.x_pre = x_pre.mutable_data_ptr();
  }
  auto out = run_separable_fprop(p, x, w_dw, w_pw, with_statistics);
  return {out.y, out.statistics, out.counts, x_pre};
}

__global__ void probe_kernel() {}

// What CUDA says to running this library's code on the current device: a cudaError_t, 0 where it can.
int64_t cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  cudaGetLastError();
  return static_cast<int64_t>(code);
}

// The architectures this library holds code for: 800 is sm_80.
Ints cuda_architectures() { return {__CUDA_ARCH_LIST__}; }

// What the planner is given for a device: multiprocessors, bytes of shared memory that a CTA can have, and of L2.
Ints cuda_device_facts(int64_t device) {
  DeviceProperties found{};
  const cudaError_t code = query_device(static_cast<int>(device), found);
  STD_TORCH_CHECK(code == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(code));
  return {found.multiprocessors, found.shared_bytes_per_cta, found.l2_bytes};
}

}  // namespace
}  // namespace xsep::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(XSEP_NAMESPACE, m) {
  m.def(
      "cuda_depthwise_fprop(Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, Tensor? scale_e, Tensor? shift_e, "
      "int[] geometry, int[] activations, float[] alphas) -> Tensor");
  m.def(
      "cuda_depthwise_fprop_residual(Tensor x, Tensor w_dw, Tensor residual, Tensor? scale_p, Tensor? shift_p, "
      "Tensor? scale_e, Tensor? shift_e, int[] geometry, int[] activations, float[] alphas, Tensor(a!) x_pre) -> "
      "Tensor");
  m.def(
      "cuda_depthwise_fprop_chain(Tensor x, Tensor? residual, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, "
      "Tensor? scale_e, Tensor? shift_e, int[] geometry, int[] activations, float[] alphas, bool statistics) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, Tensor? centre, "
      "int[] geometry, int activation, float alpha, int[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_separable_fprop(Tensor x, Tensor w_dw, Tensor w_pw, Tensor? bias, Tensor? residual, Tensor? scale_p, "
      "Tensor? shift_p, Tensor? scale_m, Tensor? shift_m, Tensor? scale_e, Tensor? shift_e, int[] geometry, "
      "int[] activations, float[] alphas, bool allow_tf32) -> Tensor");
  m.def(
      "cuda_separable_fprop_chain(Tensor x, Tensor? addend, Tensor w_dw, Tensor w_pw, Tensor? scale_p, Tensor? "
      "shift_p, "
      "int[] geometry, int activation, float alpha, bool allow_tf32, bool statistics) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_probe() -> int");
  m.def("cuda_architectures() -> int[]");
  m.def("cuda_device_facts(int device) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, XSEP_DISPATCH_KEY, m) {
  m.impl("cuda_depthwise_fprop", TORCH_BOX(&xsep::cuda::cuda_depthwise_fprop));
  m.impl("cuda_depthwise_fprop_residual", TORCH_BOX(&xsep::cuda::cuda_depthwise_fprop_residual));
  m.impl("cuda_depthwise_fprop_chain", TORCH_BOX(&xsep::cuda::cuda_depthwise_fprop_chain));
  m.impl("cuda_depthwise_bprop", TORCH_BOX(&xsep::cuda::cuda_depthwise_bprop));
  m.impl("cuda_separable_fprop", TORCH_BOX(&xsep::cuda::cuda_separable_fprop));
  m.impl("cuda_separable_fprop_chain", TORCH_BOX(&xsep::cuda::cuda_separable_fprop_chain));
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_probe", TORCH_BOX(&xsep::cuda::cuda_probe));
  m.impl("cuda_architectures", TORCH_BOX(&xsep::cuda::cuda_architectures));
  m.impl("cuda_device_facts", TORCH_BOX(&xsep::cuda::cuda_device_facts));
}
