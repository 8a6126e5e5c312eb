// Statistics of y, taken by the forward that computes it: a tile is all pixels that one CTA walks over.
//
// A thread keeps its own sums in shared memory, since the sliding window needs the registers, and no thread waits for
// another before the walk is over. Its centre follows the mean of what it has seen, so that little cancels, whatever
// it saw first; the sum of y - K keeps what the rounding of K leaves.
#pragma once

#include "../channels.cuh"
#include "params.h"

namespace xsep::cuda {

template <class T, int VEC>
class FpropStatistics {
 public:
  // Behind the plan's own buffers, and only where there are statistics. All threads of the CTA.
  __device__ FpropStatistics(const DepthwiseFpropParams& p, SharedArena& arena)
      : p_(p), sums_({0}, kDepthwiseThreads), counts_{0} {
    if (p.statistics == nullptr) return;
    constexpr int kSums = ChannelTable<VEC>::size(3, kDepthwiseThreads), kBytes = kSums * 4;
    static_assert(kBytes % kSharedAlignment == 0, "the counts start where the sums end");
    sums_ = ChannelTable<VEC>(arena.take_at<float>(p.plan.shared_bytes, kSums), kDepthwiseThreads);
    counts_ = arena.take_at<int>(p.plan.shared_bytes + kBytes, kDepthwiseThreads);
    counts_[static_cast<int>(threadIdx.x)] = 0;
  }

  // Adds a row of the thread's strip, of which so many pixels are y's, as it is stored.
  __device__ __forceinline__ void add(const float (&strip)[kStripWidth][VEC], int columns) const {
    if (p_.statistics == nullptr) return;
    const int thread = static_cast<int>(threadIdx.x), before = counts_[thread];
    columns = min(columns, kStripWidth);
    float centre[VEC], sum[VEC] = {}, squares[VEC] = {};
#pragma unroll
    for (int v = 0; v < VEC; ++v) centre[v] = strip[0][v];
    round_to<T>(centre);
    if (before > 0) {
      sums_.read(centre, 0, thread);
      sums_.read(sum, 1, thread);
      sums_.read(squares, 2, thread);
    }
#pragma unroll
    for (int i = 0; i < kStripWidth; ++i) {
      float y[VEC];
      Pack<T, VEC>::round(strip[i]).widen(y);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const float off = i < columns ? y[v] - centre[v] : 0.0f;
        sum[v] += off;
        squares[v] = fmaf(off, off, squares[v]);
      }
    }
    const int after = before + columns;
    const float count = static_cast<float>(after), share = 1.0f / count;
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const float mean = fmaf(sum[v], share, centre[v]);
      move(centre[v] - mean, count, sum[v], squares[v]);
      centre[v] = mean;
    }
    sums_.write(0, thread, centre);
    sums_.write(1, thread, sum);
    sums_.write(2, thread, squares);
    counts_[thread] = after;
  }

  // The CTA's mean K, and the sums of y - K and of (y - K)^2, from those of its strips, always in their order. All
  // threads of the CTA; a barrier before.
  __device__ void store() const {
    if (p_.statistics == nullptr) return;
    __syncthreads();
    const int vectors = p_.plan.vectors, strips = p_.plan.strips_down * p_.plan.strips_across,
              channels = p_.shape.c_mid;
    for (int i = static_cast<int>(threadIdx.x); i < vectors * VEC; i += static_cast<int>(blockDim.x)) {
      const int c = static_cast<int>(blockIdx.y) * vectors * VEC + i;
      if (c >= channels) continue;
      const auto for_each_strip = [&](auto add) {
        for (int strip = 0; strip < strips; ++strip) {
          const int thread = strip * vectors + i / VEC, channel = thread * VEC + i % VEC;
          if (counts_[thread] == 0) continue;  // it had no pixel, and its sums are not there
          add(counts_[thread], sums_.at(0, channel), sums_.at(1, channel), sums_.at(2, channel));
        }
      };
      // A tile has its first strip, which has a pixel.
      const float some = sums_.at(0, i);
      int count = 0;
      float off = 0.0f;
      for_each_strip([&](int n, float centre, float sum, float) {
        count += n;
        off += fmaf(static_cast<float>(n), centre - some, sum);
      });
      const float mean = some + off / static_cast<float>(count);
      float total = 0.0f, squares = 0.0f;
      for_each_strip([&](int n, float centre, float sum, float square) {
        move(centre - mean, static_cast<float>(n), sum, square);
        total += sum;
        squares += square;
      });
      float* out = p_.statistics + static_cast<int64_t>(blockIdx.x) * 3 * channels + c;
      out[0] = mean;
      out[channels] = total;
      out[2 * static_cast<int64_t>(channels)] = squares;
      if (c == 0) p_.counts[blockIdx.x] = count;
    }
  }

 private:
  // Sums about a centre become those about one that lies `apart` below it.
  static __device__ __forceinline__ void move(float apart, float count, float& sum, float& squares) {
    const float before = sum;
    sum = fmaf(count, apart, sum);
    squares = fmaf(apart, before + sum, squares);
  }

  const DepthwiseFpropParams& p_;
  ChannelTable<VEC> sums_;  // K, sum of y - K, sum of its square: of each thread
  SharedBuffer<int> counts_;
};

}  // namespace xsep::cuda
