// From accumulators to y: affine, residual, activation, rounding, statistics, stores.
#pragma once

#include "multiply.cuh"

namespace xsep::cuda {

// Pixels of a thread: number i is 8 i + lane / 4 of the warp's block.
inline constexpr int kThreadPixels = kMmaRows * 2;

// Where a thread's pixel starts, in elements from the tile's first pixel in y; -1 if there is none. The planner sees to
// it that 32 bits suffice. Found each time it is needed: registers are scarce here.
__device__ __forceinline__ int pixel_of(const SeparableFpropParams& p, const FusedTile& tile, const FusedMemory& memory,
                                        int block, int i) {
  const int place = memory.place[block + i * 8 + static_cast<int>(threadIdx.x) % 32 / 4];
  const int row = place >> 16, column = place & 0xffff;
  if (row >= tile.rows || column >= tile.columns) return -1;
  return (row * p.shape.q + column) * p.c_out;
}

// A thread has two runs of 8 output channels of each of its pixels. The first of run number `half`:
__device__ __forceinline__ int first_of_run(int channel, int half) {
  return channel + half * kRunsBlock + static_cast<int>(threadIdx.x) % 4 * 8;
}

// Channel v of run number `half` at the thread's pixel i.
__device__ __forceinline__ float& value_of(Accumulators& y, int i, int half, int v) {
  return y[i / 2 * kMmaColumns + half * 4 + v / 2][i % 2 * 2 + v % 2];
}

// Calls f(channels, their place in elements from the tile's first pixel) for what a thread has of y, 16 bytes of
// channels at a time, which f may change.
template <class T, class Function>
__device__ __forceinline__ void for_each_vector(const SeparableFpropParams& p, const FusedTile& tile,
                                                const FusedMemory& memory, const WarpBlock& block, Accumulators& y,
                                                Function f) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kThreadPixels; ++i) {
    const int pixel = pixel_of(p, tile, memory, block.pixel, i);
    if (pixel < 0) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int first = 0; first < 8; first += kVec) {
        const int n = first_of_run(block.channel, half) + first;
        if (n >= p.c_out) continue;
        float values[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) values[v] = value_of(y, i, half, first + v);
        f(values, pixel + n);
#pragma unroll
        for (int v = 0; v < kVec; ++v) value_of(y, i, half, first + v) = values[v];
      }
    }
  }
}

// Sums over the 8 lanes that hold the same 8 channels; lane l receives that of v[summed_by(l)].
__device__ __forceinline__ int summed_by(int lane) { return (lane >> 2 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 4); }

__device__ __forceinline__ float sum_over_lanes(float (&v)[8]) {
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int distance = 4 << step, half = 4 >> step;
    const bool upper = (static_cast<int>(threadIdx.x) & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i >= half) continue;
      const float received = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + half], distance);
      v[i] = (upper ? v[i + half] : v[i]) + received;
    }
  }
  return v[0];
}

// K, the mean of a few of the tile's pixels in float32, then the sums of y - K and of (y - K)^2 over all of them: about
// a value amid the tile's own hardly anything cancels. inside: bit i says whether the thread's pixel i is one of the
// tile's. memory: of [1 + 2 blocks of pixels, output channels], once every thread is here; every thread of the CTA
// calls it.
__device__ __forceinline__ void store_statistics(const SeparableFpropParams& p, const FusedTile& tile, int index,
                                                 float* memory, Accumulators& y, unsigned inside,
                                                 const WarpBlock& block) {
  const int lane = static_cast<int>(threadIdx.x) % 32, channel = block.channel;
  const int channels = p.plan.channel_warps * kWarpChannels;
  float* const centre = memory;
  __syncthreads();
  if (block.pixel == 0 && lane < 4) {  // the thread has the tile's first pixel
    const float share = 1.0f / static_cast<float>(__popc(inside));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float mean[8] = {};
#pragma unroll
      for (int i = 0; i < kThreadPixels; ++i) {
        if ((inside >> i & 1u) == 0) continue;
#pragma unroll
        for (int v = 0; v < 8; ++v) mean[v] += value_of(y, i, half, v);
      }
#pragma unroll
      for (int v = 0; v < 8; ++v) centre[first_of_run(channel, half) + v] = mean[v] * share;
    }
  }
  __syncthreads();
  float* const sums = centre + (1 + 2 * (block.pixel / kWarpPixels)) * channels;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float first[8] = {}, second[8] = {};
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const float middle = centre[first_of_run(channel, half) + v];
#pragma unroll
      for (int i = 0; i < kThreadPixels; ++i) {
        const float d = (inside >> i & 1u) != 0 ? value_of(y, i, half, v) - middle : 0.0f;
        first[v] += d;
        second[v] = fmaf(d, d, second[v]);
      }
    }
    const int n = first_of_run(channel, half) + summed_by(lane);
    const float total = sum_over_lanes(first), squares = sum_over_lanes(second);
    if (block.exists) sums[n] = total, sums[channels + n] = squares;
  }
  __syncthreads();
  float* const out = p.statistics + static_cast<int64_t>(index) * 3 * p.c_out;
  for (int c = static_cast<int>(threadIdx.x); c < p.c_out; c += static_cast<int>(blockDim.x)) {
    float s = 0.0f, q = 0.0f;
    for (int i = 0; i < p.plan.z_rows / kWarpPixels; ++i) {
      s += centre[(1 + 2 * i) * channels + c];
      q += centre[(2 + 2 * i) * channels + c];
    }
    out[c] = centre[c], out[p.c_out + c] = s, out[2 * p.c_out + c] = q;
  }
  if (threadIdx.x == 0) p.counts[index] = tile.rows * tile.columns;
}

// accumulators become y: act(scale * (v + bias) + shift + residual), rounded to T. Every thread of the CTA calls it.
// scratch: as much as a chunk of z, which no thread needs once all are here.
template <class T>
__device__ __forceinline__ void finish_tile(const SeparableFpropParams& p, const FusedMemory& memory,
                                            const FusedStep& step, Accumulators& y, const WarpBlock& block,
                                            unsigned char* scratch) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  const FusedTile tile = memory.tile[step.map];
#pragma unroll
  for (int half = 0; p.has_epilogue != 0 && half < 2; ++half) {
    const float* affine = memory.affine.get() + first_of_run(block.channel, half);
#pragma unroll
    for (int first = 0; first < 8; first += 4) {
      const auto scale = Pack<float, 4>::load(affine + first);
      const auto shift = Pack<float, 4>::load(affine + p.plan.channel_warps * kWarpChannels + first);
#pragma unroll
      for (int i = 0; i < kThreadPixels; ++i) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float& u = value_of(y, i, half, first + v);
          u = fmaf(scale.v[v], u, shift.v[v]);
        }
      }
    }
  }
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + tile.first_pixel(p) * p.c_out;
    for_each_vector<T>(p, tile, memory, block, y, [=](float (&values)[kVec], int at) {
      float other[kVec];
      Pack<T, kVec>::load(residual + at).widen(other);
#pragma unroll
      for (int v = 0; v < kVec; ++v) values[v] += other[v];
    });
  }
  activate_groups(y, {p.epilogue.activation, p.epilogue.alpha});
  if (p.statistics != nullptr) {
    unsigned inside = 0;
#pragma unroll
    for (int i = 0; i < kThreadPixels; ++i) inside |= pixel_of(p, tile, memory, block.pixel, i) >= 0 ? 1u << i : 0u;
#pragma unroll
    for (auto& fragment : y) round_to<T>(fragment);
    store_statistics(p, tile, step.tile, reinterpret_cast<float*>(scratch), y, inside, block);
  }
  // Last: while y is stored there are no registers for more than y.
  T* out = static_cast<T*>(p.y) + tile.first_pixel(p) * p.c_out;
  for_each_vector<T>(p, tile, memory, block, y,
                     [=](float (&values)[kVec], int at) { Pack<T, kVec>::round(values).store(out + at); });
}

}  // namespace xsep::cuda
