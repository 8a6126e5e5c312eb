// The chain's way out: an image as its readers would load it, written.
#include "apply.h"

#include "images.cuh"

namespace xsep::cuda {
namespace {

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads, 4) apply_load_kernel(const __grid_constant__ ApplyParams p) {
  const ImageThread<VEC> thread(p.plan, p.shape.c);
  if (!thread.active) return;
  float scale[VEC], shift[VEC];
  read_channels<T>(scale, p.load.scale, thread.c, 1.0f);
  read_channels<T>(shift, p.load.shift, thread.c, 0.0f);
  const ActivationChoice activation{p.load.activation, p.load.alpha};
  const int64_t pixels = p.shape.pixels();
  for (int64_t pixel = thread.first; pixel < pixels; pixel += thread.step) {
    const int64_t at = pixel * p.shape.c + thread.c;
    float u[VEC];
    read_pixel<T>(u, p.x, at);
#pragma unroll
    for (int v = 0; v < VEC; ++v) u[v] = fmaf(scale[v], u[v], shift[v]);
    if (p.residual != nullptr) {
      float other[VEC];
      read_pixel<T>(other, p.residual, at);
#pragma unroll
      for (int v = 0; v < VEC; ++v) u[v] += other[v];
    }
    activate(u, activation);
    write_pixel<T>(p.y, at, u);
  }
}

}  // namespace

void apply_load(const ApplyParams& p, cudaStream_t stream) {
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(apply_load_kernel<typename E::T, E::kVec>, "apply_load_kernel", image_launch(p.plan), stream, p);
  });
}

}  // namespace xsep::cuda
