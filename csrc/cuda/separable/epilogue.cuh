// From accumulators to y: affine, residual, activation, rounding, statistics, stores.
#pragma once

#include "multiply.cuh"

namespace xsep::cuda {

// Lane t of each four gives words 0 to 3 and receives word t of lanes 0 to 3.
__device__ __forceinline__ void transpose_in_fours(uint32_t (&word)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; ++distance) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      uint32_t& low = word[i];
      uint32_t& high = word[i | distance];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
      (upper ? low : high) = received;
    }
  }
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(const float (&pair)[2]) {
  static_assert(sizeof(T) == 2, "two to a word");
  union {
    Pack<T, 2> pack;
    uint32_t bits;
  } both{Pack<T, 2>::round(pair)};
  return both.bits;
}

// Where the thread's pixel number i of four (8 i + lane / 4 of the warp's block) starts, in elements from the tile's
// first pixel in y; -1 if there is none. The planner sees to it that 32 bits suffice.
__device__ __forceinline__ int pixel_of(const SeparableFpropParams& p, const FusedTile& tile, int block, int i) {
  const int m = block + i * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
  const int row = m / p.plan.tile_columns, column = m % p.plan.tile_columns;
  if (row >= tile.rows || column >= tile.columns) return -1;
  return (row * p.shape.q + column) * p.c_out;
}

// Adds value over the lanes that hold the same output channel.
__device__ __forceinline__ float sum_over_pixels(float value) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Adds f(y - centre[n]) over the tile's pixels for each output channel n, in a fixed order, and hands the total to
// store(n, total). Barriers before and after.
template <class Function, class Store>
__device__ __forceinline__ void sum_over_tile(const Accumulators& y, unsigned inside, int channel,
                                              const FusedMemory& memory, const float* centre, int channels, Function f,
                                              Store store) {
  const int lane = static_cast<int>(threadIdx.x) % 32, row_warp = static_cast<int>(threadIdx.x) / 32 % kRowWarps;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kMmaColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = channel + j * 8 + lane % 4 * 2 + e;
      const float middle = centre[n];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum += (inside >> i & 1u) != 0 ? f(y[i / 2 * kMmaColumns + j][i % 2 * 2 + e] - middle) : 0.0f;
      sum = sum_over_pixels(sum);
      if (lane < 4) memory.sums[row_warp * channels + n] = sum;
    }
  }
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < channels; n += static_cast<int>(blockDim.x)) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowWarps; ++i) total += memory.sums[i * channels + n];
    store(n, total);
  }
}

// The tile's mean K in float32, then the sums of y - K and of (y - K)^2: about the tile's own mean nothing cancels.
// inside: bit i says whether the thread's pixel i is one of the tile's.
__device__ __forceinline__ void store_statistics(const SeparableFpropParams& p, const FusedTile& tile,
                                                 const FusedMemory& memory, const Accumulators& y, unsigned inside,
                                                 int channel) {
  const int channels = p.plan.channel_warps * kWarpChannels;
  const float count = static_cast<float>(tile.pixels());
  float* out = p.statistics + static_cast<int64_t>(blockIdx.x) * 3 * p.c_out;
  float* centre = memory.affine.get();  // of no more use to the epilogue
  __syncthreads();
  for (int n = static_cast<int>(threadIdx.x); n < channels; n += static_cast<int>(blockDim.x)) centre[n] = 0.0f;
  const auto same = [](float v) { return v; };
  sum_over_tile(y, inside, channel, memory, centre, channels, same, [&](int n, float total) {
    centre[n] = total / count;
    if (n < p.c_out) out[n] = centre[n];
  });
  sum_over_tile(y, inside, channel, memory, centre, channels, same, [&](int n, float total) {
    if (n < p.c_out) out[p.c_out + n] = total;
  });
  const auto square = [](float v) { return v * v; };
  sum_over_tile(y, inside, channel, memory, centre, channels, square, [&](int n, float total) {
    if (n < p.c_out) out[2 * p.c_out + n] = total;
  });
  if (threadIdx.x == 0) p.counts[blockIdx.x] = tile.pixels();
}

// The two neighbouring channels of fragment j at pixel i of four.
__device__ __forceinline__ float (&pair_of(Accumulators& y, int i, int j))[2] {
  return *reinterpret_cast<float (*)[2]>(&y[i / 2 * kMmaColumns + j][i % 2 * 2]);
}

template <class T>
__device__ __forceinline__ void store_rows(const SeparableFpropParams& p, const FusedTile& tile, Accumulators& y,
                                           const int (&pixel)[4], int channel) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  T* out = static_cast<T*>(p.y) + tile.first_pixel(p) * p.c_out;
  if constexpr (sizeof(T) == 2) {
    if (p.c_out % 8 == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < kMmaColumns / 4; ++half) {
          union {
            uint32_t word[4];
            Pack<T, 8> pack;
          } line;
#pragma unroll
          for (int j = 0; j < 4; ++j) line.word[j] = pack_pair<T>(pair_of(y, i, half * 4 + j));
          transpose_in_fours(line.word);
          const int n = channel + half * 32 + quad * 8;
          if (pixel[i] >= 0 && n < p.c_out) line.pack.store(out + (pixel[i] + n));
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (pixel[i] < 0) continue;
#pragma unroll
    for (int j = 0; j < kMmaColumns; ++j) {
      const int n = channel + j * 8 + quad * 2;
      if (n < p.c_out) Pack<T, 2>::round(pair_of(y, i, j)).store(out + (pixel[i] + n));
    }
  }
}

// accumulators become y: act(scale * (v + bias) + shift + residual), rounded to T.
template <class T>
__device__ __forceinline__ void finish_tile(const SeparableFpropParams& p, const FusedTile& tile,
                                            const FusedMemory& memory, Accumulators& y, int block, int channel) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  int pixel[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pixel[i] = pixel_of(p, tile, block, i);
  const T* residual =
      p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + tile.first_pixel(p) * p.c_out;
  const float* affine = memory.affine.get() + channel + quad * 2;
#pragma unroll
  for (int j = 0; j < kMmaColumns; ++j) {
    const auto scale = Pack<float, 2>::load(affine + j * 8);
    const auto shift = Pack<float, 2>::load(affine + p.plan.channel_warps * kWarpChannels + j * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float (&u)[2] = pair_of(y, i, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) u[e] = fmaf(scale.v[e], u[e], shift.v[e]);
    }
  }
  if (residual != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (pixel[i] < 0) continue;
#pragma unroll
      for (int j = 0; j < kMmaColumns; ++j) {
        const int n = channel + j * 8 + quad * 2;
        if (n >= p.c_out) continue;
        float other[2];
        Pack<T, 2>::load(residual + (pixel[i] + n)).widen(other);
        float (&u)[2] = pair_of(y, i, j);
        u[0] += other[0];
        u[1] += other[1];
      }
    }
  }
  activate_groups(y, {p.epilogue.activation, p.epilogue.alpha});
  store_rows<T>(p, tile, y, pixel, channel);
  if (p.statistics == nullptr) return;
#pragma unroll
  for (auto& fragment : y) map(fragment, [](float v) { return round_to<T>(v); });
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) inside |= pixel[i] >= 0 ? 1u << i : 0u;
  store_statistics(p, tile, memory, y, inside, channel);
}

}  // namespace xsep::cuda
