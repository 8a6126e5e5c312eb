// The operators xsep::cpu_separable_wgrad, xsep::cpu_pointwise_product, and both with the depthwise backward behind
// them: xsep::cpu_separable_bprop.
#include <torch/library.h>

#include <type_traits>

#include "depthwise_bprop_op.h"
#include "glue.h"
#include "pair_gemm.h"
#include "planes.h"

namespace xsep::cpu {
namespace {

/// dv^T z [C_out, C_in, 1, 1] of a type, with z = middle(dw(prologue(x))) made again tile by tile; multiplier 1.
Tensor wgrad_of_type(at::ScalarType dtype, const Tensor& dv, const Tensor& x, const Tensor& w_dw,
                     const OptionalTensor& scale_p, const OptionalTensor& shift_p, const OptionalTensor& scale_m,
                     const OptionalTensor& shift_m, at::IntArrayRef geometry, at::IntArrayRef activations,
                     at::ArrayRef<double> alphas) {
  const DepthwiseShape shape = checked_shape(x, w_dw, geometry);
  TORCH_CHECK(activations.size() == 2 && alphas.size() == 2, "expected 2 activations and 2 alphas");
  TORCH_CHECK(shape.multiplier == 1, "w_dw must have as many filters as x has channels, but is ", w_dw.sizes());
  check_input(dv, x.scalar_type(), 4, "dv");
  const int64_t c_out = dv.size(1);
  TORCH_CHECK(dv.size(0) == shape.n && c_out > 0 && dv.size(2) == shape.p && dv.size(3) == shape.q, "dv must be [",
              shape.n, ", C_out, ", shape.p, ", ", shape.q, "], but is ", dv.sizes());
  const auto options = at::TensorOptions().dtype(dtype);
  if (shape.n == 0) return at::zeros({c_out, shape.c, 1, 1}, options);

  DepthwiseInputs inputs(x, w_dw, scale_p, shift_p, activations[0], alphas[0], shape, 1);
  const AffineBuffers middle(scale_m, shift_m, shape.c, 1, inputs.params.c_pad, activations[1], alphas[1]);
  const bool planes = is_nchw(dv);
  const Tensor dv_image = planes ? dv : to_nhwc(dv);
  SeparableWgrad p{};
  p.depthwise = inputs.params;
  p.depthwise.output = middle.affine();
  p.c_out = c_out;
  p.pairs = pair_gemm(x.scalar_type()) == PairGemm::kDot;
  p.plan = plan_cpu_wgrad(shape, c_out, at::get_num_threads(), p.z_bytes());
  p.dv = dv_image.const_data_ptr();
  p.plane = planes ? shape.p * shape.q : 0;
  p.dw_row = round_up(shape.c, 16);
  Tensor dw = empty({c_out, shape.c, 1, 1}, options);
  const bool in_place = p.plan.pixel_groups == 1 && p.dw_row == shape.c && dtype == at::kFloat;
  const Tensor partials =
      in_place ? dw : empty({p.plan.pixel_groups, c_out, p.dw_row}, at::TensorOptions().dtype(at::kFloat));
  p.dw = partials.mutable_data_ptr<float>();

  const Tensor scratch = empty_bytes(p.scratch_bytes() * at::get_num_threads());
  at::parallel_for(0, p.plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    char* mine = static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * p.scratch_bytes();
    RowWindow window = p.window(mine);
    with_storage(x.scalar_type(), [&](auto t) {
      for (int64_t task = begin; task < end; ++task) {
        if (inputs.dtype() == x.scalar_type()) {
          separable_wgrad_task<decltype(t), decltype(t)>(p, task, window, mine);
        } else {
          separable_wgrad_task<float, decltype(t)>(p, task, window, mine);
        }
      }
    });
  });

  if (in_place) return dw;
  const int64_t grain = std::max<int64_t>(32768 / (shape.c * p.plan.pixel_groups), 1);
  at::parallel_for(0, c_out, grain, [&](int64_t begin, int64_t end) {
    with_storage(dtype, [&](auto t) {
      using T = decltype(t);
      reduce_wgrad(p.dw, p.plan.pixel_groups, c_out, p.dw_row, shape.c, {begin, end},
                   static_cast<T*>(dw.mutable_data_ptr()));
    });
  });
  return dw;
}

/// The same in float32, for what is still to be multiplied.
Tensor separable_wgrad(const Tensor& dv, const Tensor& x, const Tensor& w_dw, const OptionalTensor& scale_p,
                       const OptionalTensor& shift_p, const OptionalTensor& scale_m, const OptionalTensor& shift_m,
                       at::IntArrayRef geometry, at::IntArrayRef activations, at::ArrayRef<double> alphas) {
  return wgrad_of_type(at::kFloat, dv, x, w_dw, scale_p, shift_p, scale_m, shift_m, geometry, activations, alphas);
}

/// One panel of w_pw [C_out, C_mid], which dz = dv w_pw multiplies by, to `out`: pairs, or float.
void pack_transposed(const Tensor& w, bool pairs, int64_t panel, void* out) {
  const int64_t c_out = w.size(0), c_mid = w.size(1);
  if (pairs) {
    const auto* from = static_cast<const BFloat16*>(w.const_data_ptr());
    return pack_transposed_panel(c_out, c_mid, from, panel, static_cast<uint32_t*>(out));
  }
  with_storage(w.scalar_type(), [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(w.const_data_ptr());
    pack_transposed_panel(c_out, c_mid, from, panel, static_cast<float*>(out));
  });
}

/// f(begin, end, scratch) for parts of [0, tasks), each with so many bytes of a thread's own.
template <class F>
void parallel_with_scratch(int64_t tasks, int64_t bytes, F&& f) {
  const Tensor scratch = empty_bytes(bytes * at::get_num_threads());
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    f(begin, end, static_cast<char*>(scratch.mutable_data_ptr()) + at::get_thread_num() * bytes);
  });
}

/// A panel is packed where it is multiplied: its weights are never written to memory. dv is what the product reads.
template <class T>
void product_by_panels(Pointwise p, const CpuTilePlan& plan, const void* dv, const Tensor& w) {
  const int64_t panel_bytes = round_up(p.panel_bytes(), 64);
  parallel_with_scratch(plan.tasks(), panel_bytes, [&](int64_t begin, int64_t end, char* packed) {
    alignas(64) float products[kProductRows * kPanelColumns];
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_transposed(w, p.pairs, panel, packed);
      for (int64_t i = 0; i < plan.tiles; ++i) {
        const Range tile = plan.tile(i);
        const char* from = static_cast<const char*>(dv) + tile.begin * p.z_stride * p.z_bytes();
        multiply_panel<T>(p, from, packed, {}, panel, tile.end - tile.begin, tile.begin, products);
      }
    }
  });
}

/// dv as the product reads it: T, or float made of it, brought tile by tile where it does not lie so.
template <class T>
struct DvTiles {
  const T* dv;
  int64_t depth;
  int64_t plane;  // pixels of one, where dv is NCHW, else 0
  bool pairs;

  bool lies_so() const { return !plane && (pairs || std::is_same_v<T, float>); }
  int64_t bytes() const { return pairs ? 2 : 4; }
  int64_t step() const { return lies_so() ? depth : brought_pixel_step(depth, bytes()); }
  int64_t tile_bytes(int64_t pixels) const { return lies_so() ? 0 : round_up(pixels * step() * bytes(), 64); }

  const void* bring(Range pixels, char* scratch) const {
    if (lies_so()) return dv + pixels.begin * depth;
    if (pairs) {
      bring_as(pixels, reinterpret_cast<T*>(scratch));
    } else {
      bring_as(pixels, reinterpret_cast<float*>(scratch));
    }
    return scratch;
  }

 private:
  template <class To>
  void bring_as(Range pixels, To* to) const {
    if (plane) return pixels_from_planes(Planes<const T>{dv, depth, plane}, pixels, {0, depth}, to, step());
    if constexpr (!std::is_same_v<T, To>) {
      for (int64_t i = pixels.begin; i < pixels.end; ++i, to += step()) to_floats(dv + i * depth, depth, to);
    }
  }
};

template <class T>
void product_by_tiles(Pointwise p, const CpuTilePlan& plan, const DvTiles<T>& dv, const Tensor& w) {
  const Tensor packed = empty({plan.panels * p.panel_bytes()}, w.options().dtype(at::kByte));
  char* const panels = static_cast<char*>(packed.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(32768 / (p.depth * kPanelColumns), 1);
  at::parallel_for(0, plan.panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_transposed(w, p.pairs, panel, panels + panel * p.panel_bytes());
    }
  });
  p.w_packed = panels;
  p.z_stride = dv.step();
  parallel_with_scratch(plan.tasks(), dv.tile_bytes(plan.tile_pixels), [&](int64_t begin, int64_t end, char* scratch) {
    alignas(64) float products[kProductRows * kPanelColumns];
    for (int64_t task = begin; task < end; ++task) {
      const Range tile = plan.tile(task % plan.tiles);
      const Range group = plan.group_panels(task / plan.tiles);
      const int64_t count = tile.end - tile.begin;
      const void* from = dv.bring(tile, scratch);
      Soon next_tile{};
      if (!dv.plane) {
        constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
        next_tile = {reinterpret_cast<const char*>(dv.dv + tile.end * dv.depth), count * dv.depth * kBytes};
      }
      for (int64_t panel = group.begin; panel < group.end; ++panel) {
        const Soon soon = panel + 1 < group.end ? Soon{p.panel(panel + 1), p.panel_bytes()} : next_tile;
        multiply_panel<T>(p, from, p.panel(panel), soon, panel, count, tile.begin, products);
      }
    }
  });
}

/// Every pixel by a matrix: dz = dv w_pw, [N, C_out, P, Q] x [C_out, C_mid, 1, 1] -> [N, C_mid, P, Q], in NHWC; the
/// forward's product too, where the weights are given turned round.
Tensor pointwise_product(const Tensor& dv, const Tensor& w_pw) {
  check_input(dv, dv.scalar_type(), 4, "dv");
  check_input(w_pw, dv.scalar_type(), 4, "w_pw");
  const int64_t c_out = w_pw.size(0);
  const int64_t c_mid = w_pw.size(1);
  TORCH_CHECK(dv.size(1) == c_out && c_out > 0 && c_mid > 0 && w_pw.size(2) == 1 && w_pw.size(3) == 1, "w_pw must be [",
              dv.size(1), ", C_mid, 1, 1], but is ", w_pw.sizes());
  Tensor dz = empty_nhwc(dv.size(0), c_mid, dv.size(2), dv.size(3), dv);
  if (dz.numel() == 0) return dz;

  const Tensor w = w_pw.contiguous();
  Pointwise p{};
  p.c_out = c_mid;
  p.depth = c_out;
  p.pairs = kHasBFloat16Instructions && dv.scalar_type() == at::kBFloat16 && c_out % 2 == 0;
  p.z_stride = c_out;
  p.y = dz.mutable_data_ptr();
  const int64_t plane = dv.size(2) * dv.size(3);
  const int64_t panels = ceil_div(c_mid, kPanelColumns);
  const CpuTilePlan plan = plan_cpu_product(dv.size(0) * plane, c_out, panels, at::get_num_threads(), p.z_bytes());
  const Tensor image = is_nchw(dv) && !plan.z_first ? dv : to_nhwc(dv);
  with_storage(dv.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const DvTiles<T> tiles{static_cast<const T*>(image.const_data_ptr()), c_out, is_nchw(image) ? plane : 0, p.pairs};
    if (!plan.z_first) return product_by_tiles<T>(p, plan, tiles, w);
    const Tensor read = tiles.lies_so() ? image : image.to(at::kFloat);
    product_by_panels<T>(p, plan, read.const_data_ptr(), w);
  });
  return dz;
}

/// Gradients of y = pw(dw(prologue(x))) for x, w_dw, w_pw, scale_p and shift_p, the last two in float32; empty where
/// not wanted. Multiplier 1. dx is in the layout that PyTorch's convolutions would give it. What is not turned round in
/// the kernels' tiles is turned round once for all of them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> separable_bprop(const Tensor& dy, const Tensor& x,
                                                                   const Tensor& w_dw, const Tensor& w_pw,
                                                                   const OptionalTensor& scale_p,
                                                                   const OptionalTensor& shift_p,
                                                                   at::IntArrayRef geometry, int64_t activation,
                                                                   double alpha, std::array<bool, 5> wanted) {
  const DepthwiseShape shape = checked_shape(x, w_dw, geometry);
  const bool in_units = cpu_turns_in_units(shape);
  const bool by_rows = cpu_brings_rows(shape, true, at::get_num_threads(), 1, x.element_size());
  const Tensor dy_image = in_units ? dy : to_nhwc(dy);
  const Tensor image = in_units && (by_rows || !wanted[2]) ? x : to_nhwc(x);
  Tensor dw_pw = at::empty({0}, x.options());
  if (wanted[2]) {
    dw_pw = wgrad_of_type(x.scalar_type(), dy_image, image, w_dw, scale_p, shift_p, {}, {}, geometry, {activation, 0},
                          {alpha, 0.0});
  }
  if (!wanted[0] && !wanted[1] && !wanted[3] && !wanted[4]) {
    return {at::empty({0}, x.options()), at::empty({0}, x.options()), dw_pw, zeros_float({0}), zeros_float({0})};
  }
  auto [dx, dw_dw, dscale, dshift] =
      depthwise_bprop(pointwise_product(dy_image, w_pw), image, w_dw, scale_p, shift_p, geometry, activation, alpha,
                      {wanted[0], wanted[1], wanted[3], wanted[4]}, !wants_nhwc({x, w_dw, w_pw}), w_dw.scalar_type());
  return {dx, dw_dw, dw_pw, dscale, dshift};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def(
      "cpu_separable_wgrad(Tensor dv, Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, Tensor? scale_m, "
      "Tensor? shift_m, int[] geometry, int[] activations, float[] alphas) -> Tensor");
  m.def("cpu_pointwise_product(Tensor dv, Tensor w_pw) -> Tensor");
  m.def(
      "cpu_separable_bprop(Tensor dy, Tensor x, Tensor w_dw, Tensor w_pw, Tensor? scale_p, Tensor? shift_p, "
      "int[] geometry, int activation, float alpha, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) {
  m.impl("cpu_separable_wgrad", &separable_wgrad);
  m.impl("cpu_pointwise_product", &pointwise_product);
  m.impl("cpu_separable_bprop", &separable_bprop);
}

}  // namespace xsep::cpu
