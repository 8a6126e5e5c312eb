// The depthwise convolution of a strip of pixels, out of shared memory.
#pragma once

#include "../numeric.cuh"

namespace xsep::cuda {

// sum += VEC channels of WIDTH neighbouring pixels. source: the first pixel's first tap; pixels and rows of
// pixels lie pixel_bytes and row_bytes apart. taps: the weights of these channels, a row of `table` floats for each
// tap.
template <class T, int K, int STRIDE, int WIDTH, int VEC>
__device__ __forceinline__ void slide_window(float (&sum)[WIDTH][VEC], const unsigned char* source, int pixel_bytes,
                                             int row_bytes, const float* taps, int table) {
  constexpr int kWidth = (WIDTH - 1) * STRIDE + K;
#pragma unroll 1
  for (int r = 0; r < K; ++r) {
    Pack<float, VEC> weight[K];
#pragma unroll
    for (int k = 0; k < K; ++k) weight[k] = Pack<float, VEC>::load(taps + (r * K + k) * table);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float x[VEC];
      Pack<T, VEC>::load(reinterpret_cast<const T*>(source + r * row_bytes + i * pixel_bytes)).widen(x);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const int k = i - j * STRIDE;
        if (k < 0 || k >= K) continue;
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[j][v] = fmaf(x[v], weight[k].v[v], sum[j][v]);
      }
    }
  }
}

}  // namespace xsep::cuda
