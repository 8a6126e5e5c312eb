// A strip of the depthwise backward: what its x meets of dz, and the sums of many strips.
#pragma once

#include "../channels.cuh"

namespace xsep::cuda {

// The dz that reaches a strip: how many rows and columns lie before the strip's own, and how wide it is.
template <int K, int STRIDE>
struct DzReach {
  static constexpr int kBefore = (K - 1) / STRIDE;
  static constexpr int kWidth = (kStripWidth - 1) / STRIDE + kBefore + 1;
};

// Adds to a strip's dx and to the thread's dw what comes from row i of the dz that reaches the strip; i has to be known
// at compile time, once the caller's loop is unrolled.
template <int K, int STRIDE, int ROWS, int VEC, class Table>
__device__ __forceinline__ void add_dz_row(float (&dx)[ROWS][kStripWidth][VEC], float (&dw)[K * K][VEC],
                                           const float (&x)[ROWS][kStripWidth][VEC],
                                           const float (&dz)[DzReach<K, STRIDE>::kWidth][VEC], int i,
                                           const Table& weights, int vector) {
  static_assert(ROWS % STRIDE == 0 && kStripWidth % STRIDE == 0, "all strips of a plane start on an even tap");
  constexpr int kBefore = DzReach<K, STRIDE>::kBefore;
#pragma unroll
  for (int y = 0; y < ROWS; ++y) {
    const int r = y - (i - kBefore) * STRIDE;
    if (r < 0 || r >= K) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float weight[VEC];
      weights.read(weight, r * K + k, vector);
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
        if ((j - k) % STRIDE != 0) continue;
        const int at = (j - k) / STRIDE + kBefore;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          dx[y][j][v] = fmaf(dz[at][v], weight[v], dx[y][j][v]);
          dw[r * K + k][v] = fmaf(dz[at][v], x[y][j][v], dw[r * K + k][v]);
        }
      }
    }
  }
}

// Adds one filter row's sums over the strips of the CTA, in the order of the strips, and stores the totals.
template <int VEC, int COUNT>
__device__ void reduce_over_strips(float (&sum)[COUNT][VEC], SharedBuffer<float> scratch, float* out,
                                   int out_row_length, int c, int channels, int vectors, int strips, int vector,
                                   int strip) {
  const int width = vectors * VEC;
  if (strip < strips && c + vector * VEC < channels) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) scratch[(strip * COUNT + i) * width + vector * VEC + v] = sum[i][v];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < COUNT * width; i += static_cast<int>(blockDim.x)) {
    float total = 0.0f;
    for (int s = 0; s < strips; ++s) total += scratch[s * COUNT * width + i];
    if (c + i % width < channels) out[static_cast<int64_t>(i / width) * out_row_length + c + i % width] = total;
  }
  __syncthreads();
}

}  // namespace xsep::cuda
