// The training chain's max-pool, 3 x 3 of stride 2, behind a BatchNorm and beside another: which tap of a window was
// taken is kept in a byte, and the gradient goes back to it.
#pragma once

#include <cstring>

#include "../common/geometry.h"
#include "activate.h"
#include "channels.h"

namespace xsep::cpu {

/// [n, h, w, c] -> [n, p, q, c]; the first window begins at row -top, column -left.
struct PoolShape {
  int64_t n, c, h, w;
  int64_t p, q;
  int64_t top, left;

  static constexpr int kSize = 3, kStride = 2;
  /// The windows of an axis that hold a place: first the one of the earlier tap.
  static Range windows(int64_t place, int64_t pad, int64_t count) {
    const int64_t at = place + pad;
    return {std::max<int64_t>(ceil_div(at - kSize + 1, kStride), 0), std::min(at / kStride + 1, count)};
  }
};

namespace detail {

typedef uint8_t VecByte __attribute__((vector_size(kLanes)));

XSEP_INLINE VecInt load_bytes(const uint8_t* p, int lanes) {
  VecByte bytes = {};
  std::memcpy(&bytes, p, static_cast<size_t>(lanes));
  return __builtin_convertvector(bytes, VecInt);
}
XSEP_INLINE void store_bytes(uint8_t* p, VecInt v, int lanes) {
  const VecByte bytes = __builtin_convertvector(v, VecByte);
  std::memcpy(p, &bytes, static_cast<size_t>(lanes));
}

}  // namespace detail

/// t = maxpool(vec(r)) + vec_s(s), the tap taken, in scan order, and r there.
struct PoolAdd {
  PoolShape shape;
  const void* r;        // T [n, h, w, c]
  const void* s;        // T [n, p, q, c]
  ChannelAffine vec;    // scale and shift [c_pad], no activation
  ChannelAffine vec_s;  // likewise
  void* t;              // T [n, p, q, c]
  uint8_t* taps;        // [n, p, q, c]
  void* chosen;         // T [n, p, q, c]
};

/// One output pixel. Of equal values the first is taken, and the last NaN, as PyTorch does it.
template <class T>
void pool_add_pixel(const PoolAdd& p, int64_t pixel) {
  const PoolShape& s = p.shape;
  const int64_t n = pixel / (s.p * s.q), row = pixel / s.q % s.p * s.kStride - s.top;
  const int64_t column = pixel % s.q * s.kStride - s.left;
  const Range rows = taps_inside(row, s.h, s.kSize, 1), columns = taps_inside(column, s.w, s.kSize, 1);
  const T* const corner = static_cast<const T*>(p.r) + ((n * s.h + row) * s.w + column) * s.c;
  for (int64_t c = 0; c < s.c; c += kLanes) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, s.c - c));
    Vec best = broadcast(-__builtin_inff()), chosen = {};
    VecInt taken = {};
    bool any = false;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        const Vec r = load_lanes(corner + (i * s.w + j) * s.c + c, lanes);
        Vec u[1] = {r};
        apply(p.vec, c, u);
        const VecInt better = any ? (u[0] > best) | (u[0] != u[0]) : VecInt{} == VecInt{};
        any = true;
        best = better ? u[0] : best;
        chosen = better ? r : chosen;
        taken = better ? static_cast<int32_t>(i * s.kSize + j) - VecInt{} : taken;
      }
    }
    const int64_t at = pixel * s.c + c;
    Vec other[1] = {load_lanes(static_cast<const T*>(p.s) + at, lanes)};
    apply(p.vec_s, c, other);
    store_lanes(static_cast<T*>(p.t) + at, best + other[0], lanes);
    store_lanes(static_cast<T*>(p.chosen) + at, chosen, lanes);
    detail::store_bytes(p.taps + at, taken, lanes);
  }
}

/// The windows that hold one input pixel, and as which of their taps.
struct Pooled {
  int count;
  int64_t pixel[4];  // of the pool's outputs
  int32_t tap[4];

  Pooled(const PoolShape& s, int64_t in) : count(0) {
    const int64_t n = in / (s.h * s.w), h = in / s.w % s.h, w = in % s.w;
    const Range rows = s.windows(h, s.top, s.p), columns = s.windows(w, s.left, s.q);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = columns.begin; j < columns.end; ++j, ++count) {
        pixel[count] = (n * s.p + i) * s.q + j;
        tap[count] = static_cast<int32_t>((h + s.top - i * s.kStride) * s.kSize + w + s.left - j * s.kStride);
      }
    }
  }

  /// The sum of their gradients du T [n, p, q, c] that belong to the pixel, channels [c, c + lanes).
  template <class T>
  XSEP_INLINE Vec gradient(const T* du, const uint8_t* taps, int64_t channels, int64_t c, int lanes) const {
    Vec sum = {};
    for (int i = 0; i < count; ++i) {
      const int64_t at = pixel[i] * channels + c;
      const Vec v = load_lanes(du + at, lanes);
      sum = sum + (detail::load_bytes(taps + at, lanes) == tap[i] ? v : Vec{});
    }
    return sum;
  }
};

}  // namespace xsep::cpu
