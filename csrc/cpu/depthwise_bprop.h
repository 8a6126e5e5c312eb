// Depthwise backward in one pass over the input's pixels: dgrad, wgrad and the prologue's gradients together, each
// loaded dz vector used for both dx and dw.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/cpu_plan.h"
#include "../common/geometry.h"
#include "activate.h"
#include "channels.h"
#include "input_rows.h"
#include "planes.h"
#include "unit_sums.h"

namespace xsep::cpu {

/// What dx is the gradient of: x, u = scale * x + shift, or act(u), which the convolution reads.
enum class GradientOf { kX, kU, kLoaded };

/// With x~ = act(scale * x + shift) and dx~ the convolution's gradient:
/// du = act'(scale * x + shift) dx~, dx = scale du, dscale = sum(x du), dshift = sum(du).
struct DepthwiseBprop {
  DepthwiseShape shape;
  CpuBackwardPlan plan;
  int64_t c_pad;           // table_row(shape.c)
  const void* x;           // T [n, h, w, c], or [n, c, h, w]
  const void* dz;          // T [n, p, q, multiplier, c]
  const float* w;          // [multiplier, r * s, c_pad]
  ChannelAffine prologue;  // scale and shift [c_pad]
  void* dx;                // T [n, h, w, c], or [n, c, h, w]; may be null
  GradientOf dx_of;        // x where daffine is wanted
  double* dw;              // [plan.row_groups, multiplier, r * s, c_pad], may be null unless makes_all
  double* daffine;         // [plan.row_groups, 2, c_pad]: dscale, dshift; may be null
  bool x_planes;           // x is [n, c, h, w]: each unit turns its part round
  bool dx_planes;          // likewise

  /// Whether blocks slide with a stride: then they make dx and dw together, whichever is wanted, to keep the code
  /// small.
  static bool makes_all(const DepthwiseShape& s) {
    const Geometry& g = s.geometry;
    return g.stride_w == 2 && g.dilation_h == 1 && g.dilation_w == 1 && (s.s == 3 || s.s == 5 || s.s == 7);
  }
  bool through_x() const { return dx != nullptr || daffine != nullptr; }
  bool through_value_of_x() const { return dw || daffine || prologue.activation != Activation::kIdentity; }
  /// Of a unit's part of x, and of dx in its place, from pixel to pixel.
  int64_t turned_step(int64_t element_bytes) const {
    return brought_pixel_step(std::min(plan.group_channels, shape.c), element_bytes);
  }
  /// What one thread needs.
  int64_t scratch_bytes(int64_t element_bytes) const {
    if (!x_planes && !dx_planes) return 0;
    return round_up(plan.group_rows * shape.w * turned_step(element_bytes) * element_bytes, 64);
  }
};

namespace detail {

/// Which rows of the filter, every stride_h-th in [begin, end), an input row meets, and the row of outputs where it
/// meets the first. Found once a row: dividing by a stride takes as long as some products.
struct FilterRows {
  int64_t begin, end;
  int64_t p;  // the rows above belong to the next rows of the filter

  FilterRows() = default;
  FilterRows(const DepthwiseShape& s, int64_t h) {
    const int64_t stride = s.geometry.stride_h, top = h + s.geometry.pad_top;
    begin = std::max<int64_t>(top - (s.p - 1) * stride, top % stride);
    end = std::min<int64_t>(top + 1, s.r);
    p = (top - begin) / stride;
  }
};

/// Adjacent input pixels of one row, channels [c_begin, c_end).
template <class T>
struct InputBlock {
  const T* x;      // first pixel, channel 0
  T* dx;           // likewise, or x's own place; may be null
  int64_t x_step;  // elements from pixel to pixel
  int64_t dx_step;
  const T* dz;        // picture, output row 0, column 0, channel 0
  int64_t h;          // input row
  FilterRows filter;  // of h
  int64_t column;     // input column of the first pixel
  int64_t c_begin, c_end;
  float* dw;       // [multiplier, r * s, sum_stride], channel 0; null where not wanted
  float* daffine;  // [2, sum_stride], channel 0; null where not wanted
  int64_t sum_stride;
};

XSEP_INLINE void add_to(float* sum, Vec v) { store(sum, load(sum) + v); }

template <int N, class T>
XSEP_INLINE void load_prologue(const DepthwiseBprop& p, const InputBlock<T>& b, int64_t c, int64_t lanes, Vec (&u)[N]) {
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) u[i] = load_lanes(b.x + i * b.x_step + c, lanes);
  scale_and_shift(p.prologue, c, u);
}

/// From dx~ of N adjacent pixels to dx and the sums over pixels.
template <int N, class T>
XSEP_INLINE void finish_pixels(const DepthwiseBprop& p, const InputBlock<T>& b, int64_t c, int64_t lanes, Vec (&d)[N]) {
  const ChannelAffine& prologue = p.prologue;
  const Activation activation = p.dx_of == GradientOf::kLoaded ? Activation::kIdentity : prologue.activation;
  if (activation == Activation::kRelu) {
    Vec u[N];
    load_prologue(p, b, c, lanes, u);
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) d[i] = u[i] > 0.0f ? d[i] : Vec{};
  } else if (activation != Activation::kIdentity) {
    Vec u[N];
    load_prologue(p, b, c, lanes, u);
    differentiate_all(u, N, activation, prologue.alpha);
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) d[i] = d[i] * u[i];
  }
  if (b.daffine) {
    Vec dscale = {};
    Vec dshift = {};
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) {
      dscale = fma(load_first(b.x + i * b.x_step + c, lanes), d[i], dscale);
      dshift = dshift + d[i];
    }
    add_to(b.daffine + c, dscale);
    add_to(b.daffine + b.sum_stride + c, dshift);
  }
  if (!b.dx) return;
  if (prologue.scale && p.dx_of == GradientOf::kX) {
    const Vec scale = load(prologue.scale + c);
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) d[i] = d[i] * scale;
  }
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) store_lanes(b.dx + i * b.dx_step + c, d[i], lanes);
}

/// How the blocks of a row of inputs are made: dilation 1 and horizontal stride kStride. The first input lies kPhase
/// columns right of one whose distance from the padded edge is a multiple of the stride. kS = 0: any filter, stride and
/// dilation, input by input.
template <int kFilter, int kStrideW, int kPhaseW>
struct Sliding {
  static constexpr int kS = kFilter, kStride = kStrideW, kPhase = kPhaseW;
  static constexpr int kReach = (kS - 1) / kStride;  // columns of dz left of the first input's own
  /// From the first input's own column of dz to the last one's, of so many.
  static constexpr int last_own(int pixels) { return (kPhase + pixels - 1) / kStride; }
};
using General = Sliding<0, 1, 0>;

/// The columns of dz that kPixels inputs see are loaded once a filter row. kBorder: columns outside dz are skipped, and
/// the last vector of channels may be incomplete.
template <class T, class How, int kPixels, bool kDx, bool kDw, bool kBorder>
void sliding_input_block(const DepthwiseBprop& p, const InputBlock<T>& b) {
  constexpr int kS = How::kS, kStride = How::kStride, kReach = How::kReach;
  constexpr int kOwnColumns = How::last_own(kPixels) + 1;
  constexpr int kColumns = kOwnColumns + kReach;
  const DepthwiseShape& shape = p.shape;
  const int64_t stride_h = shape.geometry.stride_h;
  const int64_t dz_step = shape.c * shape.multiplier;
  const int64_t column = (b.column + shape.geometry.pad_left) / kStride - kReach;
  const int64_t first = std::max<int64_t>(-column, 0);
  const int64_t last = std::min<int64_t>(shape.q - column, kColumns);
  const int64_t dz_row_step = shape.q * dz_step;
  const T* const dz = b.dz + b.filter.p * dz_row_step + column * dz_step;
  const int64_t dz_below = dz_row_step + kReach * dz_step;
  for (int64_t c = b.c_begin; c < b.c_end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, b.c_end - c) : kLanes;
    // What the next row of inputs reads and this one does not, and where its gradient is stored.
    prefetch_pixels<kOwnColumns>(dz, dz_below, dz_step, c);
    if (kDw && !p.x_planes) prefetch_pixels<kPixels>(b.x, shape.w * b.x_step, b.x_step, c);
    if (kDx && b.dx && !p.dx_planes) prefetch_pixels<kPixels>(b.dx, shape.w * b.dx_step, b.dx_step, c);
    Vec x[kPixels];
    if constexpr (kDw) {
      load_prologue(p, b, c, lanes, x);
      activate(x, p.prologue.activation, p.prologue.alpha);
    }
    Vec dx[kPixels];
    set_zero(dx);
    for (int64_t i = 0; i < shape.multiplier; ++i) {
      const T* row = dz + i * shape.c + c;
      for (int64_t r = b.filter.begin; r < b.filter.end; r += stride_h, row -= dz_row_step) {
        const int64_t tap = (i * shape.r + r) * kS;
        const float* w_row = p.w + tap * p.c_pad + c;
        float* dw_row = b.dw + tap * b.sum_stride + c;
        Vec w[kS];
        Vec dw[kS];
        set_zero(dw);
        if constexpr (kDx) {
          XSEP_UNROLL
          for (int s = 0; s < kS; ++s) w[s] = load(w_row + s * p.c_pad);
        }
        const T* at = row;
        XSEP_UNROLL
        for (int j = 0; j < kColumns; ++j, at += dz_step) {
          if (kBorder && (j < first || j >= last)) continue;
          const Vec d = kBorder ? load_lanes(at, lanes) : load(at);
          XSEP_UNROLL
          for (int s = 0; s < kS; ++s) {
            const int pixel = (j - kReach) * kStride + s - How::kPhase;
            if (pixel >= 0 && pixel < kPixels) {
              if constexpr (kDx) dx[pixel] = fma(d, w[s], dx[pixel]);
              if constexpr (kDw) dw[s] = fma(d, x[pixel], dw[s]);
            }
          }
        }
        if constexpr (kDw) {
          XSEP_UNROLL
          for (int s = 0; s < kS; ++s) add_to(dw_row + s * b.sum_stride, dw[s]);
        }
      }
    }
    if constexpr (kDx) finish_pixels(p, b, c, lanes, dx);
  }
}

/// An output that one input pixel takes part in.
struct Tap {
  int64_t dz;   // offset of its channel 0 from the picture's
  int64_t tap;  // r * S + s
};

/// Any stride and dilation, one pixel.
template <class T, bool kDx, bool kDw>
void general_input_pixel(const DepthwiseBprop& p, const InputBlock<T>& b, const std::vector<Tap>& taps) {
  const DepthwiseShape& shape = p.shape;
  for (int64_t c = b.c_begin; c < b.c_end; c += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, b.c_end - c);
    Vec x[1];
    if constexpr (kDw) {
      load_prologue(p, b, c, lanes, x);
      activate(x, p.prologue.activation, p.prologue.alpha);
    }
    Vec dx[1];
    set_zero(dx);
    for (int64_t i = 0; i < shape.multiplier; ++i) {
      for (const Tap& t : taps) {
        const int64_t tap = i * shape.taps() + t.tap;
        const Vec d = load_first(b.dz + t.dz + i * shape.c + c, lanes);
        if constexpr (kDx) dx[0] = fma(d, load(p.w + tap * p.c_pad + c), dx[0]);
        if constexpr (kDw) add_to(b.dw + tap * b.sum_stride + c, d * x[0]);
      }
    }
    if constexpr (kDx) finish_pixels(p, b, c, lanes, dx);
  }
}

/// The outputs whose window holds input (h, w).
inline void find_taps(const DepthwiseShape& shape, int64_t h, int64_t w, std::vector<Tap>& taps) {
  const Geometry& g = shape.geometry;
  taps.clear();
  for (int64_t r = 0; r < shape.r; ++r) {
    const int64_t from_top = h + g.pad_top - r * g.dilation_h;
    if (from_top < 0 || from_top % g.stride_h != 0 || from_top / g.stride_h >= shape.p) continue;
    for (int64_t s = 0; s < shape.s; ++s) {
      const int64_t from_left = w + g.pad_left - s * g.dilation_w;
      if (from_left < 0 || from_left % g.stride_w != 0 || from_left / g.stride_w >= shape.q) continue;
      const int64_t pixel = from_top / g.stride_h * shape.q + from_left / g.stride_w;
      taps.push_back({pixel * shape.c * shape.multiplier, r * shape.s + s});
    }
  }
}

template <class T, class How, int kPixels, bool kDx, bool kDw>
void sliding_input(const DepthwiseBprop& p, InputBlock<T> b, bool border) {
  with_border<kLanes>(border, b.c_begin, b.c_end, [&](auto with) __attribute__((always_inline)) {
    sliding_input_block<T, How, kPixels, kDx, kDw, with()>(p, b);
  });
}

template <class T, class How, bool kDx, bool kDw>
void run_rows(const DepthwiseBprop& p, Range rows, const InputBlock<T>& unit, UnitSums& dw, UnitSums& daffine) {
  const DepthwiseShape& shape = p.shape;
  std::vector<Tap> taps;
  int64_t summed = 0;
  const auto count_pixels = [&](int64_t count) {
    summed += count;
    if (summed < kPixelsPerFlush) return;
    dw.flush();
    daffine.flush();
    summed = 0;
  };
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    InputBlock<T> b = unit;
    b.h = row % shape.h;
    b.filter = FilterRows(shape, b.h);
    b.dz = static_cast<const T*>(p.dz) + row / shape.h * shape.p * shape.q * shape.c * shape.multiplier;
    for (int64_t w = 0; w < shape.w;) {
      b.column = w;
      const int64_t pixel = (row - rows.begin) * shape.w + w;
      b.x = unit.x + pixel * unit.x_step;
      b.dx = unit.dx ? unit.dx + pixel * unit.dx_step : nullptr;
      if constexpr (How::kS == 0) {
        find_taps(shape, b.h, w, taps);
        general_input_pixel<T, kDx, kDw>(p, b, taps);
        count_pixels(1);
        ++w;
      } else {
        const auto take = [&](auto count) __attribute__((always_inline)) {
          const int64_t own = (w + shape.geometry.pad_left) / How::kStride;  // the first input's column of dz
          const bool border = own < How::kReach || own + How::last_own(count) >= shape.q;
          sliding_input<T, How, count(), kDx, kDw>(p, b, border);
          count_pixels(count);
          w += count;
        };
        // All but the last are of even length, so that the phase stays what it is. With a stride there are fewer
        // lengths, to keep the code small.
        constexpr bool kFours = How::kStride == 1 || kRegisters < 32;
        if (kRegisters == 32 && shape.w - w >= 8) {
          take(std::integral_constant<int, 8>{});
        } else if (kFours && shape.w - w >= 4) {
          take(std::integral_constant<int, 4>{});
        } else if (shape.w - w >= 2) {
          take(std::integral_constant<int, 2>{});
        } else {
          take(std::integral_constant<int, 1>{});
        }
      }
    }
  }
  count_pixels(kPixelsPerFlush);
}

template <class T, class How>
void run_wanted(const DepthwiseBprop& p, Range rows, const InputBlock<T>& unit, UnitSums& dw, UnitSums& daffine) {
  if (p.through_x() && p.dw) return run_rows<T, How, true, true>(p, rows, unit, dw, daffine);
  if (p.through_x()) return run_rows<T, How, true, false>(p, rows, unit, dw, daffine);
  return run_rows<T, How, false, true>(p, rows, unit, dw, daffine);
}

/// f(a Sliding) for one that the shape allows.
template <class F>
void with_filter(const DepthwiseBprop& p, F&& f) {
  const DepthwiseShape& shape = p.shape;
  const Geometry& g = shape.geometry;
  const auto with_width = [&](auto width) {
    constexpr int kS = width();
    if (g.stride_w == 1 && g.stride_h == 1) return f(Sliding<kS, 1, 0>{});
    if (g.stride_w != 2) return f(General{});
    if (g.pad_left % 2 == 0) return f(Sliding<kS, 2, 0>{});
    f(Sliding<kS, 2, 1>{});
  };
  if (g.dilation_h != 1 || g.dilation_w != 1) return f(General{});
  if (shape.s == 3) return with_width(std::integral_constant<int, 3>{});
  if (shape.s == 5) return with_width(std::integral_constant<int, 5>{});
  if (shape.s == 7) return with_width(std::integral_constant<int, 7>{});
  f(General{});
}

}  // namespace detail

/// Unit `unit` of p.plan: its rows and channels of dx, and its own slice of the partial sums. scratch: p.scratch_bytes.
template <class T>
void depthwise_bprop_unit(const DepthwiseBprop& p, int64_t unit, void* scratch) {
  const DepthwiseShape& shape = p.shape;
  const int64_t group = unit / p.plan.channel_groups;
  const int64_t c_begin = unit % p.plan.channel_groups * p.plan.group_channels;
  const int64_t c_end = std::min(c_begin + p.plan.group_channels, shape.c);
  const int64_t taps = shape.taps() * shape.multiplier;
  const Range rows{group * p.plan.group_rows, std::min((group + 1) * p.plan.group_rows, shape.n * shape.h)};
  const Range pixels{rows.begin * shape.w, rows.end * shape.w};

  const Range channels{c_begin, c_end};
  detail::UnitSums dw(p.dw ? p.dw + group * taps * p.c_pad : nullptr, taps, p.c_pad, channels);
  detail::UnitSums daffine(p.daffine ? p.daffine + group * 2 * p.c_pad : nullptr, 2, p.c_pad, channels);
  detail::InputBlock<T> b{};
  b.c_begin = c_begin;
  b.c_end = c_end;
  b.dw = dw.channel_zero();
  b.daffine = daffine.channel_zero();
  b.sum_stride = dw.stride();
  T* const turned = static_cast<T*>(scratch);
  const int64_t turned_step = p.turned_step(sizeof(T));
  b.x_step = p.x_planes ? turned_step : shape.c;
  b.dx_step = p.dx_planes ? turned_step : shape.c;
  b.x = p.x_planes ? turned - c_begin : static_cast<const T*>(p.x) + pixels.begin * shape.c;
  if (p.dx) b.dx = p.dx_planes ? turned - c_begin : static_cast<T*>(p.dx) + pixels.begin * shape.c;
  if (p.x_planes && p.through_value_of_x()) {
    const Planes<const T> x{static_cast<const T*>(p.x), shape.c, shape.h * shape.w};
    pixels_from_planes(x, pixels, channels, turned, turned_step);
  }

  detail::with_filter(p, [&](auto how) {
    using How = decltype(how);
    if constexpr (How::kStride > 1) {
      detail::run_rows<T, How, true, true>(p, rows, b, dw, daffine);
    } else {
      detail::run_wanted<T, How>(p, rows, b, dw, daffine);
    }
  });
  if (!p.dx || !p.dx_planes) return;
  const Planes<T> dx{static_cast<T*>(p.dx), shape.c, shape.h * shape.w};
  pixels_to_planes(turned, turned_step, dx, pixels, channels);
}

}  // namespace xsep::cpu
