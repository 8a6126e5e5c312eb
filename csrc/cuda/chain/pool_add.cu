// The max-pool behind a BatchNorm, with the skip added: r once through memory, the repeats of a window from L1.
#include "pool_add.h"

#include "../walk.cuh"
#include "images.cuh"

namespace xsep::cuda {
namespace {

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads, 3) pool_add_kernel(const __grid_constant__ PoolAddParams p) {
  const ImageShape& s = p.shape;
  const ImageThread<VEC> thread(p.plan, s.c);
  if (!thread.active) return;
  float scale[VEC], shift[VEC];
  read_channels(scale, p.vec, thread.c);
  read_channels(shift, p.vec + s.c, thread.c);
  const int64_t windows = static_cast<int64_t>(s.n) * p.pooled_h * p.pooled_w;
  PixelWalk walk(thread.first, thread.step, p.pooled_h, p.pooled_w);
  for (int64_t window = thread.first; window < windows; window += thread.step, walk.advance()) {
    const int column = static_cast<int>(walk.column) * 2 - p.pad_left;
    const int row = static_cast<int>(walk.row) * 2 - p.pad_top;
    float best[VEC], chosen[VEC];
    Pack<uint8_t, VEC> taps;
    bool first = true;  // taken whatever it is, so that a window of -inf alone has a tap too
#pragma unroll
    for (int v = 0; v < VEC; ++v) best[v] = chosen[v] = 0.0f, taps.v[v] = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int h = row + i;
      if (h < 0 || h >= s.h) continue;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const int w = column + j;
        if (w < 0 || w >= s.w) continue;
        float r[VEC];
        read_pixel<T>(r, p.r, ((walk.picture * s.h + h) * s.w + w) * s.c + thread.c);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          const float u = fmaf(scale[v], r[v], shift[v]);
          const bool better = first || u > best[v] || u != u;
          best[v] = better ? u : best[v];
          chosen[v] = better ? r[v] : chosen[v];
          taps.v[v] = better ? static_cast<uint8_t>(i * 3 + j) : taps.v[v];
        }
        first = false;
      }
    }
    const int64_t at = window * s.c + thread.c;
    float skip[VEC], scale_s[VEC], shift_s[VEC];
    read_pixel<T>(skip, p.s, at);
    // Read again, from L1, rather than kept beside the window.
    read_channels(scale_s, p.vec_s, thread.c);
    read_channels(shift_s, p.vec_s + s.c, thread.c);
#pragma unroll
    for (int v = 0; v < VEC; ++v) best[v] += fmaf(scale_s[v], skip[v], shift_s[v]);
    write_pixel<T>(p.t, at, best);
    taps.store(p.taps + at);
    write_pixel<T>(p.chosen, at, chosen);
  }
}

}  // namespace

void pool_add(const PoolAddParams& p, cudaStream_t stream) {
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(pool_add_kernel<typename E::T, E::kVec>, "pool_add_kernel", image_launch(p.plan), stream, p);
  });
}

}  // namespace xsep::cuda
