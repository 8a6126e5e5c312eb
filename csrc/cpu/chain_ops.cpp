// The training chain's passes over pixels: the operators xsep::cpu_chain_apply, cpu_chain_statistics,
// cpu_chain_raw_gradient, cpu_chain_input_gradient_ and cpu_chain_pool_add. The chain's products and depthwise kernels
// stand elsewhere.
#include <torch/library.h>

#include <vector>

#include "chain_apply.h"
#include "chain_gradients.h"
#include "chain_pool.h"
#include "chain_sums.h"
#include "glue.h"
#include "unit_sums.h"

namespace xsep::cpu {
namespace {

constexpr int64_t kTilePixels = 128;  // of the statistics: TILE in xsep/backends/chain.py

/// f(T{}, pixels) in parallel over an image's pixels.
template <class F>
void over_pixels(const Tensor& image, F&& f) {
  const int64_t pixels = image.size(0) * image.size(2) * image.size(3);
  at::parallel_for(0, pixels, std::max<int64_t>(32768 / image.size(1), 1), [&](int64_t begin, int64_t end) {
    with_storage(image.scalar_type(), [&](auto t) { f(t, Range{begin, end}); });
  });
}

/// An image of given sizes and x's type, in NHWC.
Tensor checked_image(const Tensor& t, const Tensor& x, at::IntArrayRef sizes, const char* name) {
  check_input(t, x.scalar_type(), 4, name);
  TORCH_CHECK(t.sizes() == sizes, name, " must be ", sizes, ", but is ", t.sizes());
  return to_nhwc(t);
}

void check_image(const Tensor& x, const char* name) {
  check_input(x, x.scalar_type(), 4, name);
  with_storage(x.scalar_type(), [](auto) {});
  TORCH_CHECK(x.size(1) > 0, name, " must have channels, but is ", x.sizes());
}

/// Rows [rows, c] of floats.
Tensor checked_rows(const Tensor& t, int64_t rows, int64_t c, const char* name) {
  check_input(t, at::kFloat, 2, name);
  TORCH_CHECK(t.size(0) == rows && t.size(1) == c, name, " must be [", rows, ", ", c, "], but is ", t.sizes());
  return t.contiguous();
}

/// vec [2, C], or none, and an activation.
AffineBuffers load_of(const OptionalTensor& vec, int64_t c, int64_t activation, double alpha) {
  if (!vec) return {{}, {}, c, 1, table_row(c), activation, alpha};
  const Tensor rows = checked_rows(*vec, 2, c, "vec");
  return {rows.select(0, 0), rows.select(0, 1), c, 1, table_row(c), activation, alpha};
}

Tensor apply_load(const Tensor& x, const OptionalTensor& vec, int64_t activation, double alpha,
                  const OptionalTensor& residual) {
  check_image(x, "x");
  const AffineBuffers load = load_of(vec, x.size(1), activation, alpha);
  const Tensor image = to_nhwc(x);
  Tensor y = empty_image(x.sizes(), x, at::MemoryFormat::ChannelsLast), added;
  ChainApply p{x.size(1), image.const_data_ptr(), load.affine(), nullptr, y.mutable_data_ptr()};
  if (residual) {
    added = checked_image(*residual, x, x.sizes(), "residual");
    p.residual = added.const_data_ptr();
  }
  over_pixels(x, [&](auto t, Range pixels) { chain_apply<decltype(t)>(p, pixels); });
  return y;
}

/// (partials [T, 3, C], counts [T])
std::tuple<Tensor, Tensor> statistics(const Tensor& r) {
  check_image(r, "r");
  const Tensor image = to_nhwc(r);
  const int64_t c = r.size(1), pixels = r.size(0) * r.size(2) * r.size(3), tiles = ceil_div(pixels, kTilePixels);
  Tensor partials = at::empty({tiles, 3, c}, r.options().dtype(at::kFloat));
  Tensor counts = at::empty({tiles}, r.options().dtype(at::kInt));
  float* const out = partials.mutable_data_ptr<float>();
  int32_t* const count = counts.mutable_data_ptr<int32_t>();
  at::parallel_for(0, tiles, std::max<int64_t>(32768 / (kTilePixels * c), 1), [&](int64_t begin, int64_t end) {
    with_storage(r.scalar_type(), [&](auto t) {
      const auto* rows = static_cast<const decltype(t)*>(image.const_data_ptr());
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * kTilePixels, some = std::min(kTilePixels, pixels - first);
        count[tile] = static_cast<int32_t>(some);
        tile_statistics(rows + first * c, some, c, out + tile * 3 * c);
      }
    });
  });
  return {partials, counts};
}

/// r's pooled resolution, windows beginning at row -pads[0], column -pads[1].
PoolShape pool_of(const Tensor& r, at::IntArrayRef pads) {
  TORCH_CHECK(pads.size() == 2 && std::min(pads[0], pads[1]) >= 0 && std::max(pads[0], pads[1]) <= 1,
              "pads must be two numbers, 0 or 1, but are ", pads);
  const int64_t h = r.size(2), w = r.size(3);
  return {r.size(0), r.size(1), h, w, ceil_div(h, 2), ceil_div(w, 2), pads[0], pads[1]};
}

/// dr = a * du + b * r + d in NHWC; taps: du has the resolution of the pool behind r.
Tensor raw_gradient_of(const Tensor& du, const OptionalTensor& taps, const Tensor& r, const Tensor& coef,
                       at::IntArrayRef pads) {
  check_image(r, "r");
  const int64_t c = r.size(1);
  const Tensor image = to_nhwc(r), rows = checked_rows(coef, 3, c, "coef");
  RawGradient p{};
  Tensor du_image, taps_image;
  if (taps) {
    p.pool = pool_of(r, pads);
    const int64_t sizes[] = {r.size(0), c, p.pool.p, p.pool.q};
    du_image = checked_image(du, r, sizes, "du");
    check_input(*taps, at::kByte, 4, "taps");
    TORCH_CHECK(taps->sizes() == du.sizes(), "taps must be ", du.sizes(), ", but are ", taps->sizes());
    taps_image = taps->contiguous(at::MemoryFormat::ChannelsLast);
    p.taps = taps_image.const_data_ptr<uint8_t>();
  } else {
    du_image = checked_image(du, r, r.sizes(), "du");
  }
  Tensor dr = empty_image(r.sizes(), r, at::MemoryFormat::ChannelsLast);
  p.channels = c;
  p.du = du_image.const_data_ptr();
  p.r = image.const_data_ptr();
  p.coef = rows.const_data_ptr<float>();
  p.dr = dr.mutable_data_ptr();
  over_pixels(r, [&](auto t, Range pixels) { raw_gradient<decltype(t)>(p, pixels); });
  return dr;
}

/// Makes dx of e [N, C, H, W], in its place and in NHWC: with the shortcut's gradient, multiplied by act'(load(x))
/// where there is an x. The sums of dx and of dx * (operand - centre), [1 + K, C], are of pixels in groups that depend
/// on the shape alone, so that they come out the same, bit for bit, on any number of threads.
Tensor input_gradient_(Tensor& e, const OptionalTensor& shortcut, const OptionalTensor& x, const OptionalTensor& vec,
                       int64_t activation, double alpha, at::TensorList operands, const OptionalTensor& centres) {
  check_image(e, "e");
  TORCH_CHECK(e.is_contiguous(at::MemoryFormat::ChannelsLast), "e must lie in NHWC, but its strides are ", e.strides());
  const int64_t c = e.size(1), h = e.size(2), w = e.size(3), pixels = e.size(0) * h * w;
  InputGradient p{};
  p.channels = c, p.h = h, p.w = w;
  p.dx = e.mutable_data_ptr();
  Tensor g, image, rows;
  if (shortcut) {
    p.half = shortcut->sizes() != e.sizes();
    const int64_t half[] = {e.size(0), c, ceil_div(h, 2), ceil_div(w, 2)};
    g = checked_image(*shortcut, e, p.half ? at::IntArrayRef(half) : e.sizes(), "shortcut");
    p.shortcut = g.const_data_ptr();
  }
  const AffineBuffers load = load_of(vec, c, activation, alpha);
  p.load = load.affine();
  if (x) {
    image = checked_image(*x, e, e.sizes(), "x");
    p.x = image.const_data_ptr();
  }
  std::vector<Tensor> held;
  std::vector<const void*> pointers;
  for (const Tensor& operand : operands) {
    held.push_back(checked_image(operand, e, e.sizes(), "operand"));
    pointers.push_back(held.back().const_data_ptr());
  }
  GradientSums s{c, static_cast<int64_t>(operands.size()), pointers.data(), nullptr};
  if (s.operands > 0) {
    TORCH_CHECK(centres.has_value(), "operands need centres");
    rows = checked_rows(*centres, s.rows(), c, "centres");
    s.centres = rows.const_data_ptr<float>();
  }

  constexpr int64_t kMostGroups = 256;
  const int64_t runs = ceil_div(pixels, kGradientRun), group_runs = std::max<int64_t>(ceil_div(runs, kMostGroups), 1);
  const int64_t groups = ceil_div(runs, group_runs);
  Tensor sums = at::empty({s.rows(), c}, at::TensorOptions().dtype(at::kFloat));
  const Tensor partials = at::zeros({groups + 1, s.rows(), c}, at::TensorOptions().dtype(at::kDouble));
  double* const partial = partials.mutable_data_ptr<double>();
  at::parallel_for(0, groups, std::max<int64_t>(32768 / (group_runs * kGradientRun * c), 1),
                   [&](int64_t begin, int64_t end) {
                     with_storage(e.scalar_type(), [&](auto t) {
                       using T = decltype(t);
                       for (int64_t run = begin * group_runs; run < std::min(end * group_runs, runs); ++run) {
                         const int64_t first = run * kGradientRun;
                         const Range some{first, std::min(first + kGradientRun, pixels)};
                         input_gradient<T>(p, some);
                         add_gradient_sums(s, static_cast<const T*>(p.dx) + first * c, first, some.end - first,
                                           partial + run / group_runs * s.rows() * c);
                       }
                     });
                   });
  double* const total = partial + groups * s.rows() * c;
  reduce_partials(partial, groups, s.rows(), c, {0, c}, total);
  std::copy(total, total + s.rows() * c, sums.mutable_data_ptr<float>());
  return sums;
}

/// (t, taps, chosen) in NHWC
std::tuple<Tensor, Tensor, Tensor> pool_add(const Tensor& r, const Tensor& vec, const Tensor& s, const Tensor& vec_s,
                                            at::IntArrayRef pads) {
  check_image(r, "r");
  const int64_t c = r.size(1);
  PoolAdd p{};
  p.shape = pool_of(r, pads);
  const int64_t sizes[] = {r.size(0), c, p.shape.p, p.shape.q};
  const Tensor image = to_nhwc(r), other = checked_image(s, r, sizes, "s");
  const AffineBuffers load = load_of(vec, c, 0, 0), load_s = load_of(vec_s, c, 0, 0);
  Tensor t = empty_image(sizes, r, at::MemoryFormat::ChannelsLast);
  Tensor chosen = empty_image(sizes, r, at::MemoryFormat::ChannelsLast);
  Tensor taps = at::empty(sizes, r.options().dtype(at::kByte), at::MemoryFormat::ChannelsLast);
  p.r = image.const_data_ptr();
  p.s = other.const_data_ptr();
  p.vec = load.affine();
  p.vec_s = load_s.affine();
  p.t = t.mutable_data_ptr();
  p.taps = taps.mutable_data_ptr<uint8_t>();
  p.chosen = chosen.mutable_data_ptr();
  over_pixels(t, [&](auto type, Range pixels) {
    for (int64_t i = pixels.begin; i < pixels.end; ++i) pool_add_pixel<decltype(type)>(p, i);
  });
  return {t, taps, chosen};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def("cpu_chain_apply(Tensor x, Tensor? vec, int activation, float alpha, Tensor? residual) -> Tensor");
  m.def("cpu_chain_statistics(Tensor r) -> (Tensor, Tensor)");
  m.def("cpu_chain_raw_gradient(Tensor du, Tensor? taps, Tensor r, Tensor coef, int[] pads) -> Tensor");
  m.def(
      "cpu_chain_input_gradient_(Tensor(a!) e, Tensor? shortcut, Tensor? x, Tensor? vec, int activation, float alpha, "
      "Tensor[] operands, Tensor? centres) -> Tensor");
  m.def("cpu_chain_pool_add(Tensor r, Tensor vec, Tensor s, Tensor vec_s, int[] pads) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) {
  m.impl("cpu_chain_apply", &apply_load);
  m.impl("cpu_chain_statistics", &statistics);
  m.impl("cpu_chain_raw_gradient", &raw_gradient_of);
  m.impl("cpu_chain_input_gradient_", &input_gradient_);
  m.impl("cpu_chain_pool_add", &pool_add);
}

}  // namespace xsep::cpu
