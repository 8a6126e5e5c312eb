// Rows of one plane of NCHW in a thread's own memory, as float with zeros around: what lies in the padding is read like
// anything else, and columns of a stride's phase follow each other.
#pragma once

#include <algorithm>

#include "../common/cpu_plan.h"
#include "../common/geometry.h"
#include "activate.h"
#include "channels.h"
#include "transpose.h"

namespace xsep::cpu {

/// How rows lie: column i, counted from the first one of the padding, in piece i % phases at i / phases.
struct PlaneRows {
  int64_t w;       // columns of the plane
  int64_t left;    // columns of zeros before them
  int64_t phases;  // the horizontal stride
  int64_t piece;   // elements
  int64_t lead;    // elements before the first row, so that the columns of the plane begin a line where phases is 1
  int64_t ahead;   // from an element to the one that is brought in its place for the next unit

  int64_t row_elements() const { return phases * piece; }
  int64_t column(int64_t i) const { return i % phases * piece + i / phases; }
};

inline PlaneRows plane_rows(const DepthwiseShape& s, const CpuPlanesPlan& plan) {
  constexpr int64_t kLine = kLineBytes / 4;
  const Geometry& g = s.geometry;
  const int64_t lead = g.stride_w == 1 ? round_up(g.pad_left, kLine) - g.pad_left : 0;
  return {s.w, g.pad_left, g.stride_w, plane_piece(s), lead, plan.group_rows * g.stride_h * s.w};
}

namespace detail {

/// Every other element of two vectors next to each other.
XSEP_INLINE Vec every_other(Vec a, Vec b, int first) {
  VecInt index;
  for (int l = 0; l < kLanes; ++l) index[l] = 2 * l + first;
  return shuffle(a, b, index);
}

}  // namespace detail

/// One row of T, through the affine of one channel (its vectors are that channel's in all lanes), to `to`, where the
/// padding is zero already.
template <class T>
void bring_plane_row(const PlaneRows& rows, const T* from, const ChannelAffine& affine, float* to) {
  const auto loaded = [&](int64_t i) __attribute__((always_inline)) {
    Vec v[1] = {load(from + i)};
    apply(affine, 0, v);
    return v[0];
  };
  const auto first_loaded = [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
    Vec v[1] = {load_first(from + i, lanes)};
    apply(affine, 0, v);
    return v[0];
  };
  const uintptr_t soon = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(rows.ahead) * sizeof(T);
  int64_t i = 0;
  if (rows.phases == 1) {
    float* const at = to + rows.left;
    for (; i + kLanes <= rows.w; i += kLanes) {
      prefetch_pieces<1>(soon + static_cast<uintptr_t>(i) * sizeof(T), 0);
      store(at + i, loaded(i));
    }
    if (i < rows.w) store_first(at + i, first_loaded(i, rows.w - i), rows.w - i);
    return;
  }
  if (rows.phases == 2) {
    float* const even = to + rows.column(rows.left);
    float* const odd = to + rows.column(rows.left + 1);
    for (; i + 2 * kLanes <= rows.w; i += 2 * kLanes) {
      prefetch_pieces<2>(soon + static_cast<uintptr_t>(i) * sizeof(T), kLanes * sizeof(T));
      const Vec a = loaded(i), b = loaded(i + kLanes);
      store(even + i / 2, detail::every_other(a, b, 0));
      store(odd + i / 2, detail::every_other(a, b, 1));
    }
    const int64_t lanes = rows.w - i;
    if (lanes == 0) return;
    const Vec a = lanes < kLanes ? first_loaded(i, lanes) : loaded(i);
    const Vec b = lanes > kLanes ? first_loaded(i + kLanes, lanes - kLanes) : a;
    store_first(even + i / 2, detail::every_other(a, b, 0), (lanes + 1) / 2);
    if (lanes > 1) store_first(odd + i / 2, detail::every_other(a, b, 1), lanes / 2);
    return;
  }
  int64_t phase = rows.left % rows.phases, at = rows.left / rows.phases;
  for (; i < rows.w; i += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, rows.w - i));
    const Vec v = lanes < kLanes ? first_loaded(i, lanes) : loaded(i);
    for (int l = 0; l < lanes; ++l) {
      to[phase * rows.piece + at] = v[l];
      if (++phase == rows.phases) phase = 0, ++at;
    }
  }
}

}  // namespace xsep::cpu
