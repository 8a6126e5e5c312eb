// BatchNorm's backward on load, dr = coef[0] du + coef[1] r + coef[2]: one vector of one pixel.
#pragma once

#include "../numeric.cuh"
#include "params.h"

namespace xsep::cuda {

// du of one pixel of r: the sum over the windows that chose it. A pixel lies in at most two windows along each side;
// the one that begins last has the smallest tap.
template <class T, int VEC>
__device__ __forceinline__ void gather_windows(float (&du)[VEC], const RawGradientParams& p, int64_t picture, int row,
                                               int column, int c) {
  row += p.pad_top, column += p.pad_left;
#pragma unroll
  for (int v = 0; v < VEC; ++v) du[v] = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int window_row = row / 2 - i, tap_row = row % 2 + 2 * i;
    if (tap_row > 2 || window_row < 0 || window_row >= p.pooled_h) continue;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int window_column = column / 2 - j, tap_column = column % 2 + 2 * j;
      if (tap_column > 2 || window_column < 0 || window_column >= p.pooled_w) continue;
      const int64_t at = ((picture * p.pooled_h + window_row) * p.pooled_w + window_column) * p.shape.c + c;
      const auto taps = Pack<uint8_t, VEC>::load(p.taps + at);
      float part[VEC];
      read_pixel<T>(part, p.du, at);
#pragma unroll
      for (int v = 0; v < VEC; ++v) du[v] += taps.v[v] == tap_row * 3 + tap_column ? part[v] : 0.0f;
    }
  }
}

// dr from du, in the place of r.
template <int VEC>
__device__ __forceinline__ void form_raw_gradient(float (&r)[VEC], const float (&du)[VEC],
                                                  const float (&coef)[3][VEC]) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) r[v] = fmaf(coef[0][v], du[v], fmaf(coef[1][v], r[v], coef[2][v]));
}

}  // namespace xsep::cuda
