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
constexpr int kSharedBytes = shared_bytes_of(kMoments * kThreads * static_cast<int>(sizeof(double)));
constexpr int kAhead = 4;  // tiles of a thread that are on their way at a time

// Adds up what the shares of a CTA have of each moment, in their order; totals are whole in the threads of share 0. All
// threads of the CTA.
__device__ __forceinline__ void sum_shares(double (&moments)[kMoments]) {
  const int thread = static_cast<int>(threadIdx.x);
  SharedArena arena;
  const SharedBuffer<double> scratch = arena.take<double>(kMoments * kThreads);
#pragma unroll
  for (int i = 0; i < kMoments; ++i) scratch[i * kThreads + thread] = moments[i];
  __syncthreads();
  if (thread >= kColumns) return;
#pragma unroll
  for (int i = 0; i < kMoments; ++i) {
    for (int share = 1; share < kShares; ++share) moments[i] += scratch[i * kThreads + share * kColumns + thread];
  }
}

// A group's moments about the first tile's mean. CTA (group, block) has 32 channels. A tile's own offsets, of sum s and
// of squares q, are about a mean that is `apart` further: of those about the first tile's the sums are s + n apart and
// q + apart (2 s + n apart), without a division.
__global__ void __launch_bounds__(kThreads) merge_statistics_kernel(const __grid_constant__ FinalizeParams p) {
  const int column = static_cast<int>(threadIdx.x) % kColumns, share = static_cast<int>(threadIdx.x) / kColumns;
  const int c = static_cast<int>(blockIdx.y) * kColumns + column;
  // Here, so that it is done before a thread of the next launch divides by it.
  if (p.batches != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ++*p.batches;
  double moments[kMoments] = {};
  if (c < p.channels) {
    const double origin = static_cast<double>(p.partials[c]);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kShares, channels = p.channels;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kShares + share; first < p.tiles; first += kAhead * step) {
      int counts[kAhead];
      float means[kAhead], sums[kAhead], squares[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        // Past the last tile comes that one again, and is not counted.
        const int64_t tile = first + i * step, last = p.tiles - 1, at = tile < last ? tile : last;
        const float* of_tile = p.partials + at * kMoments * channels + c;
        counts[i] = tile <= last ? p.counts[at] : 0;
        means[i] = of_tile[0], sums[i] = of_tile[channels], squares[i] = of_tile[2 * channels];
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (counts[i] == 0) continue;  // a rank may have had no picture
        const double n = counts[i], s = static_cast<double>(sums[i]), apart = static_cast<double>(means[i]) - origin;
        moments[0] += n;
        moments[1] += fma(n, apart, s);
        moments[2] += fma(apart, fma(n, apart, 2.0 * s), static_cast<double>(squares[i]));
      }
    }
  }
  sum_shares(moments);
  if (share != 0 || c >= p.channels) return;
#pragma unroll
  for (int i = 0; i < kMoments; ++i) {
    p.merged[(static_cast<int64_t>(blockIdx.x) * kMoments + i) * p.channels + c] = moments[i];
  }
}

__device__ __forceinline__ float moved(float old, double now, double weight) {
  return static_cast<float>(static_cast<double>(old) + weight * (now - static_cast<double>(old)));
}

// Of 32 channels a CTA, whose threads share the groups.
__global__ void __launch_bounds__(kThreads) bn_finalize_kernel(const __grid_constant__ FinalizeParams p) {
  const int share = static_cast<int>(threadIdx.x) / kColumns;
  const int c = static_cast<int>(blockIdx.x) * kColumns + static_cast<int>(threadIdx.x) % kColumns;
  double moments[kMoments] = {};
#pragma unroll 4
  for (int group = share; c < p.channels && group < p.groups; group += kShares) {
#pragma unroll
    for (int i = 0; i < kMoments; ++i) {
      moments[i] += p.merged[(static_cast<int64_t>(group) * kMoments + i) * p.channels + c];
    }
  }
  sum_shares(moments);
  if (share != 0 || c >= p.channels) return;
  const double n = moments[0], first = moments[1], second = moments[2];
  const double mean = static_cast<double>(p.partials[c]) + first / n;
  const double spread = second - first * first / n;
  const double squares = spread < 0.0 ? 0.0 : spread;  // a NaN stays one
  const double invstd = 1.0 / sqrt(squares / n + p.eps);
  // The shift is taken from the scale as it is stored, so that scale * mean + shift is beta.
  const float scale = static_cast<float>(p.gamma == nullptr ? invstd : static_cast<double>(p.gamma[c]) * invstd);
  const double beta = p.beta == nullptr ? 0.0 : static_cast<double>(p.beta[c]);
  p.vec[c] = scale;
  p.vec[p.channels + c] = static_cast<float>(beta - mean * static_cast<double>(scale));
  p.centres[c] = p.centres[p.channels + c] = static_cast<float>(mean);
  p.invstd[c] = static_cast<float>(invstd);
  if (c == 0) *p.count = n;
  if (p.running_mean == nullptr) return;
  const double weight = p.cumulative == 0 ? p.momentum : 1.0 / static_cast<double>(*p.batches);
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
  const auto blocks = static_cast<unsigned>(ceil_div(p.channels, kColumns));
  launch(merge_statistics_kernel, "merge_statistics_kernel",
         {dim3(static_cast<unsigned>(p.groups), blocks), kThreads, kSharedBytes}, stream, p);
  launch(bn_finalize_kernel, "bn_finalize_kernel", {dim3(blocks), kThreads, kSharedBytes}, stream, p);
}

void bn_backward_finalize(const BackwardFinalizeParams& p, cudaStream_t stream) {
  launch(bn_backward_finalize_kernel, "bn_backward_finalize_kernel", one_a_channel(p.channels), stream, p);
}

}  // namespace xsep::cuda
