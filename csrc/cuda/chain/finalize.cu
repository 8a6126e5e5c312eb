// From sums to BatchNorm's vectors, in float64: a few numbers a channel, where PyTorch would launch dozens of kernels.
//
// Tiles are merged about the mean of the first: then what is added up is linear, and all that cancels in the end is
// what float64 can spare.
#include "finalize.h"

#include "../launch.cuh"

namespace xsep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;  // channels of a CTA that merges
constexpr int kShares = kThreads / kColumns;
constexpr int kMoments = 3;  // pixels, sum of offsets, sum of squared offsets

// A group's moments about the first tile's mean. CTA (group, block) has 32 channels.
__global__ void __launch_bounds__(kThreads) merge_statistics_kernel(const __grid_constant__ FinalizeParams p) {
  const int column = static_cast<int>(threadIdx.x) % kColumns, share = static_cast<int>(threadIdx.x) / kColumns;
  const int c = static_cast<int>(blockIdx.y) * kColumns + column;
  SharedArena arena;
  const SharedBuffer<double> scratch = arena.take<double>(kMoments * kThreads);
  double moments[kMoments] = {};
  if (c < p.channels) {
    const double origin = static_cast<double>(p.partials[c]);
    const int step = static_cast<int>(gridDim.x) * kShares;
    for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kShares + share; tile < p.tiles; tile += step) {
      const int count = p.counts[tile];
      if (count == 0) continue;  // a rank may have had no picture
      const float* of_tile = p.partials + tile * 3 * p.channels + c;
      const double n = count, s = static_cast<double>(of_tile[p.channels]);
      const double off = static_cast<double>(of_tile[0]) + s / n - origin;
      moments[0] += n;
      moments[1] += n * off;
      moments[2] += static_cast<double>(of_tile[2 * static_cast<int64_t>(p.channels)]) - s * s / n + n * off * off;
    }
  }
#pragma unroll
  for (int i = 0; i < kMoments; ++i) scratch[i * kThreads + static_cast<int>(threadIdx.x)] = moments[i];
  __syncthreads();
  if (share >= kMoments || c >= p.channels) return;
  double total = 0.0;
  for (int i = 0; i < kShares; ++i) total += scratch[share * kThreads + i * kColumns + column];
  p.merged[(static_cast<int64_t>(blockIdx.x) * kMoments + share) * p.channels + c] = total;
}

__device__ __forceinline__ float moved(float old, double now, double weight) {
  return static_cast<float>(static_cast<double>(old) + weight * (now - static_cast<double>(old)));
}

// One channel a thread.
__global__ void __launch_bounds__(kThreads) bn_finalize_kernel(const __grid_constant__ FinalizeParams p) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= p.channels) return;
  double n = 0.0, first = 0.0, second = 0.0;
  for (int group = 0; group < p.groups; ++group) {
    const double* moments = p.merged + static_cast<int64_t>(group) * kMoments * p.channels + c;
    n += moments[0], first += moments[p.channels], second += moments[2 * static_cast<int64_t>(p.channels)];
  }
  const double mean = static_cast<double>(p.partials[c]) + first / n;
  const double spread = second - first * first / n;
  const double squares = spread < 0.0 ? 0.0 : spread;  // a NaN stays one
  const double invstd = 1.0 / sqrt(squares / n + p.eps);
  // The shift is taken from the scale as it is stored, so that scale * mean + shift is beta.
  const float scale = static_cast<float>(p.gamma == nullptr ? invstd : static_cast<double>(p.gamma[c]) * invstd);
  const double beta = p.beta == nullptr ? 0.0 : static_cast<double>(p.beta[c]);
  p.vec[c] = scale;
  p.vec[p.channels + c] = static_cast<float>(beta - mean * static_cast<double>(scale));
  p.mean[c] = static_cast<float>(mean);
  p.invstd[c] = static_cast<float>(invstd);
  if (c == 0) *p.count = n;
  if (p.running_mean == nullptr) return;
  const double weight = p.batches == nullptr ? p.momentum : 1.0 / static_cast<double>(*p.batches);
  p.running_mean[c] = moved(p.running_mean[c], mean, weight);
  p.running_var[c] = moved(p.running_var[c], squares / (n > 2.0 ? n - 1.0 : 1.0), weight);
}

__global__ void __launch_bounds__(kThreads)
    bn_backward_finalize_kernel(const __grid_constant__ BackwardFinalizeParams p) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= p.channels) return;
  const double first = static_cast<double>(p.sums[c]), second = static_cast<double>(p.sums[p.channels + c]);
  const double invstd = static_cast<double>(p.invstd[c]);
  const double a = p.gamma == nullptr ? invstd : static_cast<double>(p.gamma[c]) * invstd;
  double b = 0.0, d = 0.0;
  if (p.batch != 0) {
    const double slope = invstd * invstd * second / *p.count;
    b = -a * slope;
    d = a * (slope * static_cast<double>(p.mean[c]) - first / *p.count);
  }
  p.coef[c] = static_cast<float>(a);
  p.coef[p.channels + c] = static_cast<float>(b);
  p.coef[2 * static_cast<int64_t>(p.channels) + c] = static_cast<float>(d);
  p.dgamma[c] = static_cast<float>(invstd * second);
  p.dbeta[c] = static_cast<float>(first);
}

LaunchShape one_a_channel(int channels) {
  return {dim3(static_cast<unsigned>(ceil_div(channels, kThreads))), kThreads, 0};
}

}  // namespace

void bn_finalize(const FinalizeParams& p, cudaStream_t stream) {
  const LaunchShape merge{dim3(static_cast<unsigned>(p.groups), static_cast<unsigned>(ceil_div(p.channels, kColumns))),
                          kThreads, shared_bytes_of(kMoments * kThreads * static_cast<int>(sizeof(double)))};
  launch(merge_statistics_kernel, "merge_statistics_kernel", merge, stream, p);
  launch(bn_finalize_kernel, "bn_finalize_kernel", one_a_channel(p.channels), stream, p);
}

void bn_backward_finalize(const BackwardFinalizeParams& p, cudaStream_t stream) {
  launch(bn_backward_finalize_kernel, "bn_backward_finalize_kernel", one_a_channel(p.channels), stream, p);
}

}  // namespace xsep::cuda
