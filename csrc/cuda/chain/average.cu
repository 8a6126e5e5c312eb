// The global average behind a BatchNorm and a ReLU: r once through memory, forward and backward.
#include "average.h"

#include "images.cuh"

namespace xsep::cuda {
namespace {

// CTA (picture, slice) makes a slice of the channels of one picture.
template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads) relu_average_kernel(const __grid_constant__ AverageParams p) {
  const ImageShape& s = p.shape;
  const ImageThread<VEC> thread(p.plan, s.c);
  const int width = p.plan.vectors * VEC, first_channel = static_cast<int>(blockIdx.y) * width;
  SharedArena arena;
  const SharedBuffer<float> scratch = arena.take<float>(p.plan.lanes * 2 * width);
  const SharedBuffer<float> totals = arena.take<float>(2 * width);
  const int64_t picture = blockIdx.x, area = static_cast<int64_t>(s.h) * s.w;
  float scale[VEC] = {}, shift[VEC] = {}, sums[2][VEC] = {};
  if (thread.active) {
    read_channels(scale, p.vec, thread.c);
    read_channels(shift, p.vec + s.c, thread.c);
  }
  for (int64_t pixel = thread.lane; thread.active && pixel < area; pixel += p.plan.lanes) {
    float r[VEC];
    read_pixel<T>(r, p.r, (picture * area + pixel) * s.c + thread.c);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float open = fmaf(scale[v], r[v], shift[v]) > 0.0f ? 1.0f : 0.0f;
      sums[0][v] += open;
      // A product, so that what is no number is seen in the sum.
      sums[1][v] += r[v] * open;
    }
  }
  sum_over_lanes(sums, p.plan, thread, scratch, [&](int row, int c, float total) { totals[row * width + c] = total; });
  for (int c = static_cast<int>(threadIdx.x); c < width; c += static_cast<int>(blockDim.x)) {
    const int channel = first_channel + c;
    if (channel >= s.c) continue;
    const int64_t at = picture * s.c + channel;
    const float count = totals[c], total = totals[width + c];
    const float mean = fmaf(p.vec[channel], total, p.vec[s.c + channel] * count) / static_cast<float>(area);
    static_cast<T*>(p.pooled)[at] = from_float<T>(mean);
    p.positive[at] = count;
    p.total[at] = total;
  }
}

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads, 4)
    relu_average_backward_kernel(const __grid_constant__ AverageBackwardParams p) {
  const ImageShape& s = p.shape;
  const ImageThread<VEC> thread(p.plan, s.c);
  if (!thread.active) return;
  float scale[VEC], shift[VEC];
  read_channels(scale, p.vec, thread.c);
  read_channels(shift, p.vec + s.c, thread.c);
  const int64_t pixels = s.pixels(), area = static_cast<int64_t>(s.h) * s.w;
  for (int64_t pixel = thread.first; pixel < pixels; pixel += thread.step) {
    const int64_t at = pixel * s.c + thread.c;
    float r[VEC], g[VEC];
    read_pixel<T>(r, p.r, at);
    read_pixel<T>(g, p.g, pixel / area * s.c + thread.c);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float open = fmaf(scale[v], r[v], shift[v]) > 0.0f ? 1.0f : 0.0f;
      g[v] = g[v] / static_cast<float>(area) * open;
    }
    write_pixel<T>(p.du, at, g);
  }
}

// One channel a thread, over the pictures.
template <class T>
__global__ void __launch_bounds__(kImageThreads)
    relu_average_sums_kernel(const __grid_constant__ AverageBackwardParams p) {
  const ImageShape& s = p.shape;
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= s.c) return;
  const float mean = p.mean[c], area = static_cast<float>(static_cast<int64_t>(s.h) * s.w);
  float first = 0.0f, second = 0.0f;
  for (int n = 0; n < s.n; ++n) {
    const int64_t at = static_cast<int64_t>(n) * s.c + c;
    // As whoever reads du sees it: rounded.
    const float share = to_float(from_float<T>(to_float(static_cast<const T*>(p.g)[at]) / area));
    first = fmaf(share, p.positive[at], first);
    second = fmaf(share, p.total[at] - mean * p.positive[at], second);
  }
  p.sums[c] = first;
  p.sums[s.c + c] = second;
}

}  // namespace

void relu_average(const AverageParams& p, cudaStream_t stream) {
  LaunchShape shape =
      image_launch(p.plan, lane_sums_bytes(p.plan, 2) +
                               shared_bytes_of(2 * p.plan.vectors * p.plan.vec * static_cast<int>(sizeof(float))));
  shape.grid.x = static_cast<unsigned>(p.shape.n);
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(relu_average_kernel<typename E::T, E::kVec>, "relu_average_kernel", shape, stream, p);
  });
}

void relu_average_backward(const AverageBackwardParams& p, cudaStream_t stream) {
  const LaunchShape sums{dim3(static_cast<unsigned>(ceil_div(p.shape.c, kImageThreads))), kImageThreads, 0};
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(relu_average_backward_kernel<typename E::T, E::kVec>, "relu_average_backward_kernel", image_launch(p.plan),
           stream, p);
    launch(relu_average_sums_kernel<typename E::T>, "relu_average_sums_kernel", sums, stream, p);
  });
}

}  // namespace xsep::cuda
