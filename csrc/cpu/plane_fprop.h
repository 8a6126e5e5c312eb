// Depthwise forward of NCHW as it lies: vectors go along the rows of one channel's plane, whose weights are the same in
// every lane. No number of channels leaves lanes idle, and nothing is turned round.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/cpu_plan.h"
#include "../common/geometry.h"
#include "activate.h"
#include "plane_rows.h"

namespace xsep::cpu {

/// Vectors of a row whose sums are in registers together, of kPlaneRows rows.
constexpr int kPlaneVectors = kRegisters == 32 ? 2 : 1;

struct PlaneFprop {
  DepthwiseShape shape;
  CpuPlanesPlan plan;
  PlaneRows rows;
  const void* x;           // T [n, c, h, w]
  const float* w;          // [c * multiplier, r * s]
  ChannelAffine prologue;  // scale and shift [c]
  ChannelAffine output;    // scale and shift [c * multiplier]
  void* y;                 // T [n, c * multiplier, p, q]

  int64_t rows_in(int64_t rows_out) const {
    return (rows_out - 1) * shape.geometry.stride_h + (shape.r - 1) * shape.geometry.dilation_h + 1;
  }
  /// Of a thread: rows, and what the last whole vectors read beyond them.
  int64_t scratch_bytes() const {
    const int64_t elements = rows_in(plan.group_rows) * rows.row_elements();
    return (rows.lead + elements + kPlaneVectors * kLanes) * static_cast<int64_t>(sizeof(float));
  }
};

namespace detail {

/// One channel of an affine, in all lanes.
struct OfOneChannel {
  float scale[kLanes], shift[kLanes];
  ChannelAffine affine;

  OfOneChannel(const ChannelAffine& of, int64_t c) : affine{nullptr, nullptr, of.activation, of.alpha} {
    if (of.scale) std::fill(scale, scale + kLanes, of.scale[c]), affine.scale = scale;
    if (of.shift) std::fill(shift, shift + kLanes, of.shift[c]), affine.shift = shift;
  }
  OfOneChannel(const OfOneChannel&) = delete;
};

/// Outputs next to each other, kVectors vectors of kRows rows, of a filter kTaps by kTaps (0: r by s). in: tap (0, 0)
/// of the first one. Sums are in the order of the filter, as for NHWC.
template <int kTaps, int kStride, int kRows, int kVectors>
XSEP_INLINE void plane_sums(const PlaneFprop& p, const float* in, const float* w, Vec (&sum)[kRows * kVectors]) {
  set_zero(sum);
  const int64_t row = p.rows.row_elements();
  const Geometry& g = p.shape.geometry;
  if constexpr (kTaps > 0) {
    const int64_t piece = p.rows.piece;
    // So many weights do not stay in registers, and GCC would keep them on the stack: each block reads them again.
    if constexpr (kTaps > 3) __asm__("" : "+r"(w) : : "memory");
    const float* line = in;
    XSEP_UNROLL
    for (int h = 0; h < (kRows - 1) * kStride + kTaps; ++h, line += row) {
      XSEP_UNROLL
      for (int s = 0; s < kTaps; ++s) {
        XSEP_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          const Vec v = in_register(load(line + s % kStride * piece + s / kStride + j * kLanes));
          XSEP_UNROLL
          for (int i = 0; i < kRows; ++i) {
            const int r = h - i * kStride;
            if (r >= 0 && r < kTaps) {
              sum[i * kVectors + j] = fma(v, broadcast(w[r * kTaps + s]), sum[i * kVectors + j]);
            }
          }
        }
      }
    }
  } else {
    const int64_t phases = p.rows.phases, next_phase = g.dilation_w % phases, next_column = g.dilation_w / phases;
    for (int64_t r = 0; r < p.shape.r; ++r) {
      int64_t phase = 0, column = 0;
      for (int64_t s = 0; s < p.shape.s; ++s) {
        const Vec weight = broadcast(*w++);
        const float* at = in + r * g.dilation_h * row + phase * p.rows.piece + column;
        phase += next_phase, column += next_column;
        if (phase >= phases) phase -= phases, ++column;
        XSEP_UNROLL
        for (int i = 0; i < kRows; ++i, at += g.stride_h * row) {
          XSEP_UNROLL
          for (int j = 0; j < kVectors; ++j) {
            Vec& to = sum[i * kVectors + j];
            to = fma(load(at + j * kLanes), weight, to);
          }
        }
      }
    }
  }
}

/// kRows rows of outputs of one filter.
template <class T, int kTaps, int kStride, int kRows>
void plane_row_block(const PlaneFprop& p, const float* in, const float* w, const ChannelAffine& output, T* y) {
  const int64_t width = p.shape.q;
  int64_t q = 0;
  while (q < width) {
    const auto take = [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = vectors();
      Vec sum[kRows * kVectors];
      plane_sums<kTaps, kStride, kRows, kVectors>(p, in + q, w, sum);
      apply(output, 0, sum);
      const int64_t lanes_of_last = std::min<int64_t>(kLanes, width - q - (kVectors - 1) * kLanes);
      T* to = y + q;
      XSEP_UNROLL
      for (int i = 0; i < kRows; ++i, to += width) {
        XSEP_UNROLL
        for (int j = 0; j < kVectors - 1; ++j) store(to + j * kLanes, sum[i * kVectors + j]);
        store_lanes(to + (kVectors - 1) * kLanes, sum[(i + 1) * kVectors - 1], lanes_of_last);
      }
      q += kVectors * kLanes;
    };
    if (kPlaneVectors > 1 && width - q > kLanes) {
      take(std::integral_constant<int, kPlaneVectors>{});
    } else {
      take(std::integral_constant<int, 1>{});
    }
  }
}

template <class T, int kTaps, int kStride>
void plane_rows_out(const PlaneFprop& p, const float* in, int64_t count, const float* w, const ChannelAffine& output,
                    T* y) {
  const int64_t in_step = p.shape.geometry.stride_h * p.rows.row_elements();
  int64_t i = 0;
  const auto take = [&](auto rows) {
    plane_row_block<T, kTaps, kStride, rows()>(p, in + i * in_step, w, output, y + i * p.shape.q);
    i += rows();
  };
  while (i + kPlaneRows <= count) take(std::integral_constant<int, kPlaneRows>{});
  switch (count - i) {
    case 3:
      return take(std::integral_constant<int, 3>{});
    case 2:
      return take(std::integral_constant<int, 2>{});
    case 1:
      return take(std::integral_constant<int, 1>{});
  }
}

template <class T>
using PlaneRowsOut = void (*)(const PlaneFprop&, const float*, int64_t, const float*, const ChannelAffine&, T*);

template <class T, int kTaps>
PlaneRowsOut<T> of_stride(int64_t stride) {
  return stride == 1 ? plane_rows_out<T, kTaps, 1> : plane_rows_out<T, kTaps, 2>;
}

template <class T>
PlaneRowsOut<T> rows_out_of(const DepthwiseShape& s) {
  const Geometry& g = s.geometry;
  const bool dense = g.dilation_h == 1 && g.dilation_w == 1 && g.stride_h == g.stride_w && g.stride_h <= 2;
  const bool square = dense && s.r == s.s;
  if (square && s.r == 3) return of_stride<T, 3>(g.stride_h);
  if (square && s.r == 5) return of_stride<T, 5>(g.stride_h);
  if (square && s.r == 7) return of_stride<T, 7>(g.stride_h);
  return plane_rows_out<T, 0, 0>;
}

}  // namespace detail

/// Rows of outputs of one plane of x, of all pictures' planes, for all its filters: filter i's at y + i * step, one row
/// after the other. scratch: p.scratch_bytes(), zero or left by another call.
template <class T, class Y>
void plane_outputs(const PlaneFprop& p, int64_t plane, Range of, void* scratch, Y* y, int64_t step) {
  const DepthwiseShape& s = p.shape;
  const int64_t c = plane % s.c, count = of.end - of.begin;
  float* const rows = static_cast<float*>(scratch) + p.rows.lead;
  const T* const x = static_cast<const T*>(p.x) + plane * s.h * s.w;
  const detail::OfOneChannel prologue(p.prologue, c);
  const int64_t h = of.begin * s.geometry.stride_h - s.geometry.pad_top;
  for (int64_t i = 0; i < p.rows_in(count); ++i) {
    float* const to = rows + i * p.rows.row_elements();
    if (h + i < 0 || h + i >= s.h) {
      std::fill(to, to + p.rows.row_elements(), 0.0f);
    } else {
      bring_plane_row(p.rows, x + (h + i) * s.w, prologue.affine, to);
    }
  }
  const detail::PlaneRowsOut<Y> rows_out = detail::rows_out_of<Y>(s);
  for (int64_t i = 0; i < s.multiplier; ++i) {
    const detail::OfOneChannel output(p.output, c * s.multiplier + i);
    rows_out(p, rows, count, p.w + (c * s.multiplier + i) * s.taps(), output.affine, y + i * step);
  }
}

/// Unit `unit` of p.plan: some rows of outputs of one picture's channel, for all its filters. scratch as there.
template <class T>
void plane_fprop_unit(const PlaneFprop& p, int64_t unit, void* scratch) {
  const DepthwiseShape& s = p.shape;
  const int64_t plane = unit / p.plan.row_groups;  // of all pictures
  const int64_t first = unit % p.plan.row_groups * p.plan.group_rows;
  const Range rows{first, std::min(first + p.plan.group_rows, s.p)};
  T* const y = static_cast<T*>(p.y) + plane * s.multiplier * s.p * s.q + first * s.q;
  plane_outputs<T>(p, plane, rows, scratch, y, s.p * s.q);
}

}  // namespace xsep::cpu
