// Depthwise forward, fast path: square filters of 3, 5 or 7, stride 1 or 2, whole 16-byte vectors of channels.
//
// A thread computes ROWS x kStripWidth neighbouring pixels of y for one vector of channels. It loads each input row
// under them once, all vectors of the row in flight together, and slides the filter over it in registers; the threads
// of a CTA lie in one compact tile, so what strips share is found in L1. A CTA keeps one slice of the channels, whose
// weights it holds in shared memory, and walks over tiles.
#pragma once

#include "../channels.cuh"
#include "../launch.cuh"
#include "params.h"
#include "statistics.cuh"

namespace xsep::cuda {

// One input row under a strip: WIDTH neighbouring pixels of VEC channels, with the prologue applied.
template <class T, int VEC, int WIDTH>
struct InputRow {
  float tap[WIDTH][VEC];

  // pixel: of the row's first column, which is column w of W; columns outside read as zero, after the prologue too.
  __device__ __forceinline__ void load(const DepthwiseFpropParams& p, int64_t pixel, int c, int w,
                                       const float (&scale)[VEC], const float (&shift)[VEC], bool with_prologue) {
    const int64_t first = pixel * p.shape.c_in + c;
    const T* x = static_cast<const T*>(p.x) + first;
    Pack<T, VEC> raw[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const bool inside = static_cast<unsigned>(w + i) < static_cast<unsigned>(p.shape.w);
      raw[i] = inside ? Pack<T, VEC>::load(x + i * p.shape.c_in) : Pack<T, VEC>::zero();
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) raw[i].widen(tap[i]);
    if (!with_prologue) return;
    const T* residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + first;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      float (&pre)[VEC] = tap[i];
#pragma unroll
      for (int v = 0; v < VEC; ++v) pre[v] = fmaf(scale[v], pre[v], shift[v]);
      if (residual == nullptr || static_cast<unsigned>(w + i) >= static_cast<unsigned>(p.shape.w)) continue;
      float other[VEC];
      Pack<T, VEC>::load(residual + i * p.shape.c_in).widen(other);
#pragma unroll
      for (int v = 0; v < VEC; ++v) pre[v] += other[v];
      round_to<T>(pre);  // what backward will find in x_pre
    }
    activate_groups(tap, {p.prologue.activation, p.prologue.alpha});
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const bool inside = static_cast<unsigned>(w + i) < static_cast<unsigned>(p.shape.w);
#pragma unroll
      for (int v = 0; v < VEC; ++v) tap[i][v] = inside ? tap[i][v] : 0.0f;
    }
  }
};

// Writes x_pre for the pixels of x that belong to the strip at (p0, q0): every pixel belongs to exactly one.
template <class T, int VEC, int STRIDE, int ROWS>
__device__ void store_x_pre(const DepthwiseFpropParams& p, int64_t picture, int p0, int q0, int c,
                            const float (&scale)[VEC], const float (&shift)[VEC]) {
  const ConvShape& s = p.shape;
  const auto clamp = [](int v, int high) { return v < 0 ? 0 : (v > high ? high : v); };
  const int top = p0 == 0 ? 0 : clamp(p0 * STRIDE - s.pad_top, s.h);
  const int bottom = p0 + ROWS >= s.p ? s.h : clamp((p0 + ROWS) * STRIDE - s.pad_top, s.h);
  const int left = q0 == 0 ? 0 : clamp(q0 * STRIDE - s.pad_left, s.w);
  const int right = q0 + kStripWidth >= s.q ? s.w : clamp((q0 + kStripWidth) * STRIDE - s.pad_left, s.w);
  for (int h = top; h < bottom; ++h) {
    for (int w = left; w < right; ++w) {
      const int64_t at = ((picture * s.h + h) * s.w + w) * s.c_in + c;
      float pre[VEC], other[VEC];
      Pack<T, VEC>::load(static_cast<const T*>(p.x) + at).widen(pre);
      Pack<T, VEC>::load(static_cast<const T*>(p.residual) + at).widen(other);
#pragma unroll
      for (int v = 0; v < VEC; ++v) pre[v] = fmaf(scale[v], pre[v], shift[v]) + other[v];
      Pack<T, VEC>::round(pre).store(static_cast<T*>(p.x_pre) + at);
    }
  }
}

template <class T, int K, int STRIDE, int ROWS>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_fprop_kernel(const __grid_constant__ DepthwiseFpropParams p) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  constexpr int kWidth = (kStripWidth - 1) * STRIDE + K;
  constexpr int kTaps = K * K;
  static_assert(kVec * sizeof(T) == 16, "a vector is one 16-byte access");

  const ConvShape& s = p.shape;
  const int vectors = p.plan.vectors;
  SharedArena arena;
  const ChannelTable<kVec> weights(arena.take<float>(ChannelTable<kVec>::size(kTaps, vectors)), vectors);
  const ChannelTable<kVec> affines(arena.take<float>(ChannelTable<kVec>::size(4, vectors)), vectors);
  const int first = static_cast<int>(blockIdx.y) * vectors * kVec;
  load_weights<T>(weights, p.w_dw, kTaps, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 0, p.prologue.scale, 1.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 1, p.prologue.shift, 0.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 2, p.epilogue.scale, 1.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 3, p.epilogue.shift, 0.0f, first, s.c_in, vectors);
  const FpropStatistics<T, kVec, ROWS> statistics(p, arena);
  __syncthreads();

  const int vector = static_cast<int>(threadIdx.x) % vectors, strip = static_cast<int>(threadIdx.x) / vectors;
  const int c = first + vector * kVec;
  const bool idle = strip >= p.plan.strips_down * p.plan.strips_across || c >= s.c_in;
  const bool with_prologue = !p.prologue.is_identity() || p.residual != nullptr;

  const int tiles = s.n * p.plan.tiles_down * p.plan.tiles_across;
  for (int tile = idle ? tiles : static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int tile_q = tile % p.plan.tiles_across, rest = tile / p.plan.tiles_across;
    const int tile_p = rest % p.plan.tiles_down;
    const int64_t picture = rest / p.plan.tiles_down;
    const int p0 = (tile_p * p.plan.strips_down + strip / p.plan.strips_across) * ROWS;
    const int q0 = (tile_q * p.plan.strips_across + strip % p.plan.strips_across) * kStripWidth;
    if (p0 >= s.p || q0 >= s.q) continue;
    const int h0 = p0 * STRIDE - s.pad_top, w0 = q0 * STRIDE - s.pad_left;

    float sum[ROWS * kStripWidth][kVec] = {};
    float scale[kVec], shift[kVec];
#pragma unroll 1
    for (int i = 0; i < (ROWS - 1) * STRIDE + K; ++i) {
      const int h = h0 + i;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(s.h)) continue;
      affines.read(scale, 0, vector);
      affines.read(shift, 1, vector);
      InputRow<T, kVec, kWidth> row;
      row.load(p, (picture * s.h + h) * s.w + w0, c, w0, scale, shift, with_prologue);
#pragma unroll
      for (int y = 0; y < ROWS; ++y) {
        const int r = i - y * STRIDE;
        if (r < 0 || r >= K) continue;
#pragma unroll
        for (int q = 0; q < K; ++q) {
          float weight[kVec];
          weights.read(weight, r * K + q, vector);
#pragma unroll
          for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
            for (int v = 0; v < kVec; ++v) {
              float& total = sum[y * kStripWidth + j][v];
              total = fmaf(row.tap[j * STRIDE + q][v], weight[v], total);
            }
          }
        }
      }
    }

    affines.read(scale, 2, vector);
    affines.read(shift, 3, vector);
#pragma unroll
    for (int j = 0; j < ROWS * kStripWidth; ++j) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) sum[j][v] = fmaf(scale[v], sum[j][v], shift[v]);
    }
    activate_groups(sum, {p.epilogue.activation, p.epilogue.alpha});
#pragma unroll
    for (int y = 0; y < ROWS; ++y) {
      if (p0 + y >= s.p) break;
      T* out = static_cast<T*>(p.y) + ((picture * s.p + p0 + y) * s.q + q0) * s.c_mid + c;
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
        if (q0 + j >= s.q) break;
        Pack<T, kVec>::round(sum[y * kStripWidth + j]).store(out + j * s.c_mid);
      }
    }
    statistics.add(sum, s.p - p0, s.q - q0);
    if (p.x_pre != nullptr) {
      affines.read(scale, 0, vector);
      affines.read(shift, 1, vector);
      store_x_pre<T, kVec, STRIDE, ROWS>(p, picture, p0, q0, c, scale, shift);
    }
  }
  statistics.store();
}

template <class T>
void launch_depthwise_fprop(const DepthwiseFpropParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers), static_cast<unsigned>(p.plan.slices)),
                          kDepthwiseThreads,
                          p.plan.shared_bytes + (p.statistics == nullptr ? 0 : fprop_statistics_bytes(p.plan))};
  void (*kernel)(DepthwiseFpropParams) = nullptr;
  switch (p.shape.r * 10 + p.shape.stride_h) {
    case 31:
      kernel = depthwise_fprop_kernel<T, 3, 1, fprop_strip_rows(3, 1)>;
      break;
    case 32:
      kernel = depthwise_fprop_kernel<T, 3, 2, fprop_strip_rows(3, 2)>;
      break;
    case 51:
      kernel = depthwise_fprop_kernel<T, 5, 1, fprop_strip_rows(5, 1)>;
      break;
    case 52:
      kernel = depthwise_fprop_kernel<T, 5, 2, fprop_strip_rows(5, 2)>;
      break;
    case 71:
      kernel = depthwise_fprop_kernel<T, 7, 1, fprop_strip_rows(7, 1)>;
      break;
    case 72:
      kernel = depthwise_fprop_kernel<T, 7, 2, fprop_strip_rows(7, 2)>;
      break;
    default:
      no_such_kernel("depthwise_fprop_kernel", p);
  }
  launch(kernel, "depthwise_fprop_kernel", shape, stream, p);
}

}  // namespace xsep::cuda
