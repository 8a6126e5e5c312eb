// The operator xsep::cpu_separable_fprop, and which GEMM it stands on.
#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cstdlib>
#include <string_view>

#include "glue.h"
#include "packed_pointwise.h"
#include "pair_gemm.h"
#include "separable_planes.h"

namespace xsep::cpu {

namespace {

/// What XSEP_CPU_BFLOAT16 asks for, as far as the chip has it; oneDNN multiplies pairs wherever AVX512_BF16 is.
std::optional<PairGemm> wished_pair_gemm() {
  const char* wish = std::getenv("XSEP_CPU_BFLOAT16");
  if (!wish || !*wish) return std::nullopt;
  const std::string_view name(wish);
  if (name == "none") return PairGemm::kNone;
  if (name == "dot") return kHasBFloat16Instructions ? PairGemm::kDot : PairGemm::kNone;
  if (name == "tiles") return kHasBFloat16Instructions ? PairGemm::kTiles : PairGemm::kNone;
  TORCH_CHECK_VALUE(false, "XSEP_CPU_BFLOAT16 must be none, dot or tiles, got '", wish, "'");
}

}  // namespace

PairGemm pair_gemm(at::ScalarType dtype) {
  if (dtype != at::kBFloat16) return PairGemm::kNone;
  static const std::optional<PairGemm> wished = wished_pair_gemm();
  if (wished) return *wished;
  if (at::globalContext().userEnabledMkldnn() && at::native::cpublas::could_pack(dtype)) return PairGemm::kTiles;
  return kHasBFloat16Instructions ? PairGemm::kDot : PairGemm::kNone;
}

namespace {

/// oneDNN's, for AMX.
void gemm_tiles(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const void* a, const void* b,
                float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, false, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c, true);
}

/// f(begin, end, scratch) for parts of [0, tasks), each with so many bytes of a thread's own.
template <class F>
void parallel_with_scratch(const SeparableFprop& p, int64_t tasks, int64_t bytes, F&& f) {
  const Tensor scratch = empty_bytes(bytes * at::get_num_threads());
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    f(begin, end, static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * bytes);
    if (p.gemm) at::native::cpublas::brgemm_release(true);
  });
}

void tile_by_tile(const SeparableFprop& p, at::ScalarType dtype, at::ScalarType input_dtype) {
  parallel_with_scratch(p, p.plan.tasks(), p.scratch_bytes(), [&](int64_t begin, int64_t end, char* scratch) {
    RowWindow window = p.window(scratch);
    with_storage(dtype, [&](auto t) {
      for (int64_t task = begin; task < end; ++task) {
        if (input_dtype == dtype) {
          separable_fprop_task<decltype(t), decltype(t)>(p, task, window, scratch);
        } else {
          separable_fprop_task<float, decltype(t)>(p, task, window, scratch);
        }
      }
    });
  });
}

/// A panel is packed where it is multiplied: its weights are never written to memory.
void all_of_z_first(const SeparableFprop& p, const Tensor& w_pw, const PointwisePacking& packing,
                    at::ScalarType input_dtype) {
  const int64_t row_bytes = p.pointwise.z_stride * p.pointwise.z_bytes();
  const Tensor z = empty_bytes(p.plan.pixels * row_bytes);
  char* const rows = static_cast<char*>(z.mutable_data_ptr());
  const CpuDepthwisePlan runs = plan_cpu_depthwise(p.depthwise.shape, at::get_num_threads());
  const InputRows& input = p.depthwise.input;
  parallel_with_scratch(p, runs.tasks, input.bytes(), [&](int64_t begin, int64_t end, char* scratch) {
    const Range pixels{begin * runs.run_pixels, std::min(end * runs.run_pixels, p.plan.pixels)};
    RowWindow window(input, scratch);
    with_storage(input_dtype, [&](auto t) { make_z<decltype(t)>(p, pixels, window, rows + pixels.begin * row_bytes); });
  });
  const char* const weights = static_cast<const char*>(w_pw.const_data_ptr());
  const int64_t panel_weights = kPanelColumns * w_pw.stride(0) * w_pw.element_size();
  const int64_t panel_bytes = round_up(p.pointwise.depth * kPanelColumns * p.pointwise.z_bytes(), 64);
  parallel_with_scratch(p, p.plan.tasks(), panel_bytes + round_up(p.products_bytes(), 64),
                        [&](int64_t begin, int64_t end, char* scratch) {
                          float* products = reinterpret_cast<float*>(scratch + panel_bytes);
                          with_storage(w_pw.scalar_type(), [&](auto t) {
                            for (int64_t panel = begin; panel < end; ++panel) {
                              pack_one_panel(w_pw, packing, panel, scratch);
                              const char* after = weights + (panel + 1) * panel_weights;
                              const Soon next = panel + 1 < end ? Soon{after, panel_weights} : Soon{};
                              multiply_all_tiles<decltype(t)>(p, panel, rows, scratch, next, products);
                            }
                          });
                        });
}

/// x, residual and y in NCHW, plane by plane.
void separable_fprop_of_planes(SeparableOfPlanes& p, const Tensor& x, const Tensor& w_dw, const Tensor& w_pw,
                               const OptionalTensor& residual, Tensor& y) {
  const Tensor image = x.contiguous();
  const Tensor taps = w_dw.to(at::kFloat).contiguous(), mixing = w_pw.to(at::kFloat).contiguous();
  const Tensor added = residual ? residual->contiguous() : Tensor();
  const DepthwiseShape& shape = p.depthwise.shape;
  p.plan = plan_cpu_separable_planes(shape, at::get_num_threads(), l2_cache_bytes());
  p.depthwise.plan.group_rows = p.plan.group_rows;
  p.depthwise.rows = plane_rows(shape, p.depthwise.plan);
  p.depthwise.rows.ahead = shape.h * shape.w;  // the next channel's
  p.depthwise.x = image.const_data_ptr();
  p.depthwise.w = taps.const_data_ptr<float>();
  p.c_out = w_pw.size(0);
  p.w_pw = mixing.const_data_ptr<float>();
  p.residual = residual ? added.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  const int64_t thread_bytes = round_up(p.scratch_bytes(), 64);
  const Tensor scratch = empty_bytes(thread_bytes * at::get_num_threads());
  at::parallel_for(0, p.plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    char* const mine = static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * thread_bytes;
    std::fill(mine + p.z_bytes(), mine + thread_bytes, char{0});
    with_storage(x.scalar_type(), [&](auto t) {
      for (int64_t task = begin; task < end; ++task) separable_planes_task<decltype(t)>(p, task, mine);
    });
  });
}

Tensor separable_fprop(const Tensor& x, const Tensor& w_dw, const Tensor& w_pw, const OptionalTensor& residual,
                       const OptionalTensor& scale_p, const OptionalTensor& shift_p, const OptionalTensor& scale_m,
                       const OptionalTensor& shift_m, const OptionalTensor& scale_e, const OptionalTensor& shift_e,
                       at::IntArrayRef geometry, at::IntArrayRef activations, at::ArrayRef<double> alphas,
                       const OptionalTensor& packed) {
  const DepthwiseShape shape = checked_shape(x, w_dw, geometry);
  TORCH_CHECK(activations.size() == 3 && alphas.size() == 3, "expected 3 activations and 3 alphas");
  const int64_t c_mid = shape.c * shape.multiplier;
  check_input(w_pw, x.scalar_type(), 4, "w_pw");
  const int64_t c_out = w_pw.size(0);
  TORCH_CHECK(c_out > 0 && w_pw.size(1) == c_mid && w_pw.size(2) == 1 && w_pw.size(3) == 1, "w_pw must be [C_out, ",
              c_mid, ", 1, 1], but is ", w_pw.sizes());
  const bool nchw = !wants_nhwc({x, w_dw, w_pw});
  const PairGemm pair = pair_gemm(x.scalar_type());
  const bool pairs = pair != PairGemm::kNone;
  const bool by_planes = cpu_separates_planes(shape, nchw, pairs, at::get_num_threads(), kLanes, l2_cache_bytes());
  const bool planes = by_planes || (nchw && stores_planes(shape));
  Tensor y = empty_image({shape.n, c_out, shape.p, shape.q}, x, planes);
  Tensor residual_rows;
  if (residual) {
    check_input(*residual, x.scalar_type(), 4, "residual");
    TORCH_CHECK(residual->sizes() == y.sizes(), "residual must be ", y.sizes(), ", but is ", residual->sizes());
    if (!by_planes) residual_rows = to_nhwc(*residual);
  }
  if (shape.n == 0) return y;
  if (by_planes) {
    const AffineBuffers prologue(scale_p, shift_p, shape.c, 1, shape.c, activations[0], alphas[0]);
    const AffineBuffers middle(scale_m, shift_m, c_mid, 1, c_mid, activations[1], alphas[1]);
    const AffineBuffers epilogue(scale_e, shift_e, c_out, 1, c_out, activations[2], alphas[2]);
    SeparableOfPlanes p{};
    p.depthwise.shape = shape;
    p.depthwise.prologue = prologue.affine();
    p.depthwise.output = middle.affine();
    p.epilogue = epilogue.affine();
    separable_fprop_of_planes(p, x, w_dw, w_pw, residual, y);
    return y;
  }

  const PointwisePacking packing = pointwise_packing(w_pw, shape.multiplier);
  const bool was_packed = is_packed(packed, packing);
  SeparableFprop p{};
  p.plan = plan_cpu_separable(shape, c_out, at::get_num_threads(), l2_cache_bytes(), pairs ? 2 : 4, was_packed);
  DepthwiseInputs inputs(x, w_dw, scale_p, shift_p, activations[0], alphas[0], shape, p.plan.panel_groups);
  const int64_t c_pad = inputs.params.c_pad;
  const AffineBuffers middle(scale_m, shift_m, shape.c, shape.multiplier, c_pad, activations[1], alphas[1]);
  const AffineBuffers epilogue(scale_e, shift_e, c_out, 1, p.plan.panels * kPanelColumns, activations[2], alphas[2]);
  p.depthwise = inputs.params;
  p.depthwise.output = middle.affine();
  p.pointwise.c_out = c_out;
  p.pointwise.depth = packing.depth;
  p.pointwise.pairs = pairs;
  p.pointwise.z_stride = round_up(c_mid, pairs ? 32 : 16);
  p.pointwise.epilogue = epilogue.affine();
  p.pointwise.residual = residual ? residual_rows.const_data_ptr() : nullptr;
  p.pointwise.y = y.mutable_data_ptr();
  p.pointwise.plane = planes ? shape.p * shape.q : 0;
  p.gemm = pair == PairGemm::kTiles ? gemm_tiles : nullptr;

  if (p.plan.z_first) {
    all_of_z_first(p, w_pw.contiguous(), packing, inputs.dtype());
  } else {
    const Tensor w_packed = was_packed ? *packed : packed_pointwise(w_pw, packing);
    p.pointwise.w_packed = w_packed.const_data_ptr();
    tile_by_tile(p, x.scalar_type(), inputs.dtype());
  }
  return nchw && !planes ? to_nchw(y) : y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def(
      "cpu_separable_fprop(Tensor x, Tensor w_dw, Tensor w_pw, Tensor? residual, Tensor? scale_p, Tensor? shift_p, "
      "Tensor? scale_m, Tensor? shift_m, Tensor? scale_e, Tensor? shift_e, int[] geometry, int[] activations, "
      "float[] alphas, Tensor? packed=None) -> Tensor");
  m.def("cpu_has_bfloat16_gemm() -> bool", [] { return pair_gemm(at::kBFloat16) != PairGemm::kNone; });
  m.def("cpu_has_bfloat16_dot() -> bool", [] { return pair_gemm(at::kBFloat16) == PairGemm::kDot; });
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) { m.impl("cpu_separable_fprop", &separable_fprop); }

}  // namespace xsep::cpu
