// BatchNorm's backward, dr = coef[0] du + coef[1] r + coef[2]: du and r once through memory, dr left in L2 by a plan
// whose slices are small enough.
#include "raw_gradient.h"

#include "images.cuh"

namespace xsep::cuda {
namespace {

// du of one pixel of r: the sum over the windows that chose it. A pixel lies in at most two windows along each side;
// the one that begins last has the smallest tap.
template <class T, int VEC>
__device__ __forceinline__ void gather_windows(float (&du)[VEC], const RawGradientParams& p, int64_t pixel, int c) {
  const ImageShape& s = p.shape;
  const int column = static_cast<int>(pixel % s.w) + p.pad_left;
  const int row = static_cast<int>(pixel / s.w % s.h) + p.pad_top;
  const int64_t picture = pixel / s.w / s.h;
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
      const int64_t at = ((picture * p.pooled_h + window_row) * p.pooled_w + window_column) * s.c + c;
      const auto taps = Pack<uint8_t, VEC>::load(p.taps + at);
      float part[VEC];
      read_pixel<T>(part, p.du, at);
#pragma unroll
      for (int v = 0; v < VEC; ++v) du[v] += taps.v[v] == tap_row * 3 + tap_column ? part[v] : 0.0f;
    }
  }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads, 3) raw_gradient_kernel(const __grid_constant__ RawGradientParams p) {
  const ImageThread<VEC> thread(p.plan, p.shape.c);
  if (!thread.active) return;
  float a[VEC], b[VEC], d[VEC];
  read_channels(a, p.coef, thread.c);
  read_channels(b, p.coef + p.shape.c, thread.c);
  read_channels(d, p.coef + 2 * static_cast<int64_t>(p.shape.c), thread.c);
  const int64_t pixels = p.shape.pixels();
  for (int64_t pixel = thread.first; pixel < pixels; pixel += thread.step) {
    const int64_t at = pixel * p.shape.c + thread.c;
    float du[VEC], r[VEC];
    read_pixel<T>(r, p.r, at);
    if (p.taps == nullptr) {
      read_pixel<T>(du, p.du, at);
    } else {
      gather_windows<T>(du, p, pixel, thread.c);
    }
#pragma unroll
    for (int v = 0; v < VEC; ++v) r[v] = fmaf(a[v], du[v], fmaf(b[v], r[v], d[v]));
    write_pixel<T>(p.dr, at, r);
  }
}

}  // namespace

void raw_gradient(const RawGradientParams& p, cudaStream_t stream) {
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(raw_gradient_kernel<typename E::T, E::kVec>, "raw_gradient_kernel", image_launch(p.plan), stream, p);
  });
}

}  // namespace xsep::cuda
