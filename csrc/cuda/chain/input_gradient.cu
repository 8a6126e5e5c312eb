// The gradient of a load, apart from any convolution: e and x once through memory, dx written once, and the sums in two
// stages, each in a fixed order.
#include "input_gradient.h"

#include "../depthwise/row_sums.cuh"
#include "../gradient_epilogue.cuh"
#include "../walk.cuh"
#include "images.cuh"

namespace xsep::cuda {
namespace {

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads, 2)
    input_gradient_kernel(const __grid_constant__ InputGradientParams p) {
  constexpr int kRows = 1 + kMostOperands;
  const ImageShape& s = p.shape;
  const GradientEpilogue& epilogue = p.epilogue;
  const ImageThread<VEC> thread(p.plan, s.c);
  const int width = p.plan.vectors * VEC, first_channel = static_cast<int>(blockIdx.y) * width;
  SharedArena arena;
  const SharedBuffer<float> scratch = arena.take<float>(p.plan.lanes * kRows * width);
  float scale[VEC] = {}, shift[VEC] = {}, centres[kMostOperands][VEC] = {};
  if (thread.active) {
    read_channels<T>(scale, p.load.scale, thread.c, 1.0f);
    read_channels<T>(shift, p.load.shift, thread.c, 0.0f);
#pragma unroll
    for (int k = 0; k < kMostOperands; ++k) {
      if (k + 1 < epilogue.sums)
        read_channels(centres[k], epilogue.centres + static_cast<int64_t>(k + 1) * s.c, thread.c);
    }
  }
  const ActivationChoice activation{p.load.activation, p.load.alpha};
  const bool reads_x =
      activation.code != Activation::kIdentity || epilogue.operands[0] == p.x || epilogue.operands[1] == p.x;
  float sums[kRows][VEC] = {};
  const int64_t pixels = s.pixels();
  PixelWalk walk(thread.first, thread.step, s.h, s.w);
  for (int64_t pixel = thread.first; thread.active && pixel < pixels; pixel += thread.step, walk.advance()) {
    const PixelPlace place{walk.picture, static_cast<int>(walk.row), static_cast<int>(walk.column),
                           pixel * s.c + thread.c};
    float d[1][VEC], x[1][VEC] = {};
    read_pixel<T>(d[0], p.e, place.at);
    if (reads_x) read_pixel<T>(x[0], p.x, place.at);
    const bool joins = epilogue.shortcut != nullptr;
    if (joins && epilogue.before_mask != 0) add_shortcut<T>(d, epilogue, place, s.h, s.w, s.c, thread.c);
    if (activation.code != Activation::kIdentity) {
      float slope[1][VEC];
#pragma unroll
      for (int v = 0; v < VEC; ++v) slope[0][v] = fmaf(scale[v], x[0][v], shift[v]);
      if (p.residual != nullptr) {
        float other[VEC];
        read_pixel<T>(other, p.residual, place.at);
#pragma unroll
        for (int v = 0; v < VEC; ++v) slope[0][v] += other[v];
      }
      multiply_by_slope(d, slope, activation);
    }
    if (joins && epilogue.before_mask == 0) add_shortcut<T>(d, epilogue, place, s.h, s.w, s.c, thread.c);
    const auto rounded = Pack<T, VEC>::round(d[0]);
    if (p.dx != nullptr) rounded.store(static_cast<T*>(p.dx) + place.at);
    rounded.widen(d[0]);
    add_to_sums<T>(sums, d, epilogue, p.x, x, place.at, s.c, {place.w, s.w}, [&](int k, float (&middle)[VEC]) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) middle[v] = centres[k][v];
    });
  }
  float* out = p.partials + static_cast<int64_t>(blockIdx.x) * epilogue.sums * s.c;
  sum_over_lanes(sums, p.plan, thread, scratch, [&](int row, int c, float total) {
    if (row < epilogue.sums && first_channel + c < s.c)
      out[static_cast<int64_t>(row) * s.c + first_channel + c] = total;
  });
}

// The second stage.
__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(const __grid_constant__ InputGradientParams p) {
  const int64_t count = static_cast<int64_t>(p.epilogue.sums) * p.shape.c, i = column_of_thread();
  sum_rows(p.partials, p.plan.workers, count, i < count, [&](float total) { p.sums[i] = total; });
}

}  // namespace

void input_gradient(const InputGradientParams& p, cudaStream_t stream) {
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(input_gradient_kernel<typename E::T, E::kVec>, "input_gradient_kernel",
           image_launch(p.plan, lane_sums_bytes(p.plan, 1 + kMostOperands)), stream, p);
  });
  const int64_t count = static_cast<int64_t>(p.epilogue.sums) * p.shape.c;
  launch(sum_partials_kernel, "sum_partials_kernel", row_sums_launch(count), stream, p);
}

}  // namespace xsep::cuda
