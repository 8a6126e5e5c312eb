// BatchNorm's backward as a pass of its own: du and r once through memory, dr left in L2 by a plan whose slices are
// small enough.
#include "raw_gradient.h"

#include "../walk.cuh"
#include "images.cuh"
#include "raw_gradient.cuh"

namespace xsep::cuda {
namespace {

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads, 3) raw_gradient_kernel(const __grid_constant__ RawGradientParams p) {
  const ImageThread<VEC> thread(p.plan, p.shape.c);
  if (!thread.active) return;
  float coef[3][VEC];
#pragma unroll
  for (int i = 0; i < 3; ++i) read_channels(coef[i], p.coef + i * static_cast<int64_t>(p.shape.c), thread.c);
  const int64_t pixels = p.shape.pixels();
  PixelWalk walk(thread.first, thread.step, p.shape.h, p.shape.w);
  for (int64_t pixel = thread.first; pixel < pixels; pixel += thread.step, walk.advance()) {
    const int64_t at = pixel * p.shape.c + thread.c;
    float du[VEC], r[VEC];
    read_pixel<T>(r, p.r, at);
    if (p.taps == nullptr) {
      read_pixel<T>(du, p.du, at);
    } else {
      gather_windows<T>(du, p, walk.picture, static_cast<int>(walk.row), static_cast<int>(walk.column), thread.c);
    }
    form_raw_gradient(r, du, coef);
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
