// The operator xsep::cpu_separable_fprop, and which GEMM it stands on.
#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include "glue.h"
#include "pair_gemm.h"

namespace xsep::cpu {

PairGemm pair_gemm(at::ScalarType dtype) {
  if (dtype != at::kBFloat16) return PairGemm::kNone;
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

/// w_pw [C_out, C_mid, 1, 1] in the order that the plan's panels are multiplied in.
Tensor packed_pointwise(const Tensor& w_pw, const PointwisePacking& packing, int64_t panels) {
  const Tensor w = w_pw.contiguous();
  const int64_t panel_size = packing.depth * kPanelColumns;
  const Tensor packed = at::empty({panels, panel_size}, w.options().dtype(packing.pairs ? at::kBFloat16 : at::kFloat));
  at::parallel_for(0, panels, std::max<int64_t>(32768 / panel_size, 1), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      void* out = static_cast<char*>(packed.mutable_data_ptr()) + panel * panel_size * packed.element_size();
      if (packing.pairs && packing.multiplier == 1 && packing.c % 2 == 0) {
        // A pair is adjacent in w_pw too and moves as one 32-bit value: the float panel of half the depth.
        const PointwisePacking halved{packing.c_out, packing.c / 2, 1, packing.depth / 2, false};
        pack_panel(halved, static_cast<const float*>(w.const_data_ptr()), panel, static_cast<float*>(out));
        continue;
      }
      if (packing.pairs) {
        pack_panel(packing, static_cast<const BFloat16*>(w.const_data_ptr()), panel, static_cast<BFloat16*>(out));
        continue;
      }
      with_storage(w.scalar_type(), [&](auto t) {
        pack_panel(packing, static_cast<const decltype(t)*>(w.const_data_ptr()), panel, static_cast<float*>(out));
      });
    }
  });
  return packed;
}

Tensor separable_fprop(const Tensor& x, const Tensor& w_dw, const Tensor& w_pw, const OptionalTensor& residual,
                       const OptionalTensor& scale_p, const OptionalTensor& shift_p, const OptionalTensor& scale_m,
                       const OptionalTensor& shift_m, const OptionalTensor& scale_e, const OptionalTensor& shift_e,
                       at::IntArrayRef geometry, at::IntArrayRef activations, at::ArrayRef<double> alphas) {
  const DepthwiseShape shape = checked_shape(x, w_dw, geometry);
  TORCH_CHECK(activations.size() == 3 && alphas.size() == 3, "expected 3 activations and 3 alphas");
  const int64_t c_mid = shape.c * shape.multiplier;
  check_input(w_pw, x.scalar_type(), 4, "w_pw");
  const int64_t c_out = w_pw.size(0);
  TORCH_CHECK(c_out > 0 && w_pw.size(1) == c_mid && w_pw.size(2) == 1 && w_pw.size(3) == 1, "w_pw must be [C_out, ",
              c_mid, ", 1, 1], but is ", w_pw.sizes());
  Tensor y = empty_nhwc(shape.n, c_out, shape.p, shape.q, x);
  Tensor residual_rows;
  if (residual) {
    check_input(*residual, x.scalar_type(), 4, "residual");
    TORCH_CHECK(residual->sizes() == y.sizes(), "residual must be ", y.sizes(), ", but is ", residual->sizes());
    residual_rows = nhwc(*residual);
  }
  if (shape.n == 0) return y;

  DepthwiseInputs inputs(x, w_dw, scale_p, shift_p, activations[0], alphas[0], shape);
  const int64_t c_pad = inputs.params.c_pad;
  const AffineBuffers middle(scale_m, shift_m, shape.c, shape.multiplier, c_pad, activations[1], alphas[1]);
  const int64_t panels = ceil_div(c_out, kPanelColumns);
  const AffineBuffers epilogue(scale_e, shift_e, c_out, 1, panels * kPanelColumns, activations[2], alphas[2]);
  const PairGemm pair = pair_gemm(x.scalar_type());
  const bool pairs = pair != PairGemm::kNone;
  const PointwisePacking packing{c_out, shape.c, shape.multiplier, pairs ? round_up(c_mid, 2) : c_mid, pairs};
  const Tensor w_packed = packed_pointwise(w_pw, packing, panels);

  SeparableFprop p{};
  p.depthwise = inputs.params;
  p.depthwise.output = middle.affine();
  p.plan = plan_cpu_separable(shape, c_out, at::get_num_threads(), l2_cache_bytes(), pairs ? 2 : 4);
  p.pointwise.c_out = c_out;
  p.pointwise.depth = packing.depth;
  p.pointwise.pairs = pairs;
  p.pointwise.z_stride = round_up(c_mid, pairs ? 32 : 16);
  p.pointwise.w_packed = w_packed.const_data_ptr();
  p.pointwise.epilogue = epilogue.affine();
  p.pointwise.residual = residual ? residual_rows.const_data_ptr() : nullptr;
  p.pointwise.y = y.mutable_data_ptr();
  p.gemm = pair == PairGemm::kTiles ? gemm_tiles : nullptr;

  const Tensor scratch = empty_bytes(p.scratch_bytes() * at::get_num_threads());
  at::parallel_for(0, p.plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    char* mine = static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * p.scratch_bytes();
    with_storage(x.scalar_type(), [&](auto t) {
      for (int64_t task = begin; task < end; ++task) {
        if (inputs.dtype() == x.scalar_type()) {
          separable_fprop_task<decltype(t), decltype(t)>(p, task, mine);
        } else {
          separable_fprop_task<float, decltype(t)>(p, task, mine);
        }
      }
    });
    if (pair == PairGemm::kTiles) at::native::cpublas::brgemm_release(true);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def(
      "cpu_separable_fprop(Tensor x, Tensor w_dw, Tensor w_pw, Tensor? residual, Tensor? scale_p, Tensor? shift_p, "
      "Tensor? scale_m, Tensor? shift_m, Tensor? scale_e, Tensor? shift_e, int[] geometry, int[] activations, "
      "float[] alphas) -> Tensor");
  m.def("cpu_has_bfloat16_gemm() -> bool", [] { return pair_gemm(at::kBFloat16) != PairGemm::kNone; });
  m.def("cpu_has_bfloat16_dot() -> bool", [] { return pair_gemm(at::kBFloat16) == PairGemm::kDot; });
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) { m.impl("cpu_separable_fprop", &separable_fprop); }

}  // namespace xsep::cpu
