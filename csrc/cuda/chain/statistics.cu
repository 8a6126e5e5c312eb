// Statistics of a raw output that another kernel wrote. About the tile's own mean nothing cancels, so r is read twice:
// once from memory, once from L1.
#include "statistics.h"

#include "images.cuh"

namespace xsep::cuda {
namespace {

template <class T, int VEC>
__global__ void __launch_bounds__(kImageThreads) tile_statistics_kernel(const __grid_constant__ StatisticsParams p) {
  const ImageThread<VEC> thread(p.plan, p.shape.c);
  const int width = p.plan.vectors * VEC, first_channel = static_cast<int>(blockIdx.y) * width;
  SharedArena arena;
  const SharedBuffer<float> scratch = arena.take<float>(p.plan.lanes * 2 * width);
  const SharedBuffer<float> centre = arena.take<float>(width);
  const int64_t tile = blockIdx.x, first = tile * kStatisticsPixels;
  const int64_t left = p.shape.pixels() - first;
  const int count = left < kStatisticsPixels ? static_cast<int>(left) : kStatisticsPixels;
  float* out = p.partials + tile * 3 * p.shape.c;
  const auto for_each_pixel = [&](auto add) {
    for (int i = thread.lane; thread.active && i < count; i += p.plan.lanes) {
      float r[VEC];
      read_pixel<T>(r, p.r, (first + i) * p.shape.c + thread.c);
      add(r);
    }
  };

  float total[1][VEC] = {};
  for_each_pixel([&](const float (&r)[VEC]) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) total[0][v] += r[v];
  });
  sum_over_lanes(total, p.plan, thread, scratch, [&](int, int c, float sum) {
    centre[c] = sum / static_cast<float>(count);
    if (first_channel + c < p.shape.c) out[first_channel + c] = centre[c];
  });

  float middle[VEC] = {}, sums[2][VEC] = {};
  if (thread.lane < p.plan.lanes) read_channels(middle, centre.get(), thread.vector * VEC);
  for_each_pixel([&](const float (&r)[VEC]) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float off = r[v] - middle[v];
      sums[0][v] += off;
      sums[1][v] = fmaf(off, off, sums[1][v]);
    }
  });
  sum_over_lanes(sums, p.plan, thread, scratch, [&](int row, int c, float sum) {
    if (first_channel + c < p.shape.c) out[static_cast<int64_t>(1 + row) * p.shape.c + first_channel + c] = sum;
  });
  if (threadIdx.x == 0 && blockIdx.y == 0) p.counts[tile] = count;
}

}  // namespace

void tile_statistics(const StatisticsParams& p, cudaStream_t stream) {
  LaunchShape shape =
      image_launch(p.plan, lane_sums_bytes(p.plan, 2) +
                               shared_bytes_of(p.plan.vectors * p.plan.vec * static_cast<int>(sizeof(float))));
  shape.grid.x = static_cast<unsigned>((p.shape.pixels() + kStatisticsPixels - 1) / kStatisticsPixels);
  with_elements(p.type, p.plan.vec, [&](auto elements) {
    using E = decltype(elements);
    launch(tile_statistics_kernel<typename E::T, E::kVec>, "tile_statistics_kernel", shape, stream, p);
  });
}

}  // namespace xsep::cuda
