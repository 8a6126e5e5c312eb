// Depthwise backward, fast path: dx, dw_dw and the prologue's sums in one pass over x and dz.
//
// A thread owns strips of x, STRIDE rows of kStripWidth pixels, for one vector of channels. The dz values that its dx
// is made of are the ones its x meets in dw_dw, so both come from the same registers. A strip starts where an even tap
// falls on its first pixel: which tap joins which x and dz is then known at compile time, for stride 2 too. The sums
// for dw_dw stay in registers over all of a CTA's tiles, are added over the CTA in a fixed order, and leave as one
// partial; a second kernel adds the partials.
#pragma once

#include "../gradient_epilogue.cuh"
#include "../launch.cuh"
#include "params.h"
#include "strip.cuh"

namespace xsep::cuda {

template <class T, int K, int STRIDE, int VEC, int ROWS>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_bprop_kernel(const __grid_constant__ DepthwiseBpropParams p) {
  constexpr int kTaps = K * K;
  constexpr int kBefore = DzReach<K, STRIDE>::kBefore, kWidth = DzReach<K, STRIDE>::kWidth;
  constexpr int kHeight = (ROWS - 1) / STRIDE + kBefore + 1;  // rows of dz that reach a strip

  const ConvShape& s = p.shape;
  const int vectors = p.plan.vectors, strips = p.plan.strips_down * p.plan.strips_across;
  SharedArena arena;
  const ChannelTable<VEC> weights(arena.take<float>(ChannelTable<VEC>::size(kTaps, vectors)), vectors);
  const ChannelTable<VEC> affines(arena.take<float>(ChannelTable<VEC>::size(2 + kMostOperands, vectors)), vectors);
  const SharedBuffer<float> scratch = arena.take<float>(K * strips * vectors * VEC);
  const int first = static_cast<int>(blockIdx.y) * vectors * VEC;
  load_weights<T>(weights, p.w_dw, kTaps, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 0, p.prologue.scale, 1.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 1, p.prologue.shift, 0.0f, first, s.c_in, vectors);
  // The training chain has a centre for each operand.
  const bool in_chain = p.epilogue.sums > 0;
  for (int k = 0; k < kMostOperands; ++k) {
    const float* of_operand =
        k + 1 < p.epilogue.sums ? p.epilogue.centres + static_cast<int64_t>(k + 1) * s.c_in : nullptr;
    const float* centres = in_chain || k > 0 ? of_operand : p.centre;
    load_channel_vector<T>(affines, 2 + k, ChannelVector{centres, 1}, 0.0f, first, s.c_in, vectors);
  }
  __syncthreads();

  const int vector = static_cast<int>(threadIdx.x) % vectors, strip = static_cast<int>(threadIdx.x) / vectors;
  const int c = first + vector * VEC;
  const bool active = strip < strips && c < s.c_in;
  const bool with_sums = in_chain || p.dscale != nullptr || p.dshift != nullptr;
  const ActivationChoice activation{p.prologue.activation, p.prologue.alpha};

  float dw[kTaps][VEC] = {};
  float sums[kMostGradientSums][VEC] = {};  // for the scale, for the shift; or the chain's
  const int tiles = s.n * p.plan.tiles_down * p.plan.tiles_across;
  for (int tile = static_cast<int>(blockIdx.x); active && tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int tile_q = tile % p.plan.tiles_across, rest = tile / p.plan.tiles_across;
    const int tile_p = rest % p.plan.tiles_down;
    const int64_t picture = rest / p.plan.tiles_down;
    const int row = (tile_p * p.plan.strips_down + strip / p.plan.strips_across) * ROWS;
    const int column = (tile_q * p.plan.strips_across + strip % p.plan.strips_across) * kStripWidth;
    const int h0 = row - s.pad_top % STRIDE, w0 = column - s.pad_left % STRIDE;
    if (h0 >= s.h || w0 >= s.w) continue;
    const int p0 = row / STRIDE + s.pad_top / STRIDE - kBefore, q0 = column / STRIDE + s.pad_left / STRIDE - kBefore;
    const auto inside = [&](int y, int j) {
      return static_cast<unsigned>(h0 + y) < static_cast<unsigned>(s.h) &&
             static_cast<unsigned>(w0 + j) < static_cast<unsigned>(s.w);
    };
    const int64_t origin = ((picture * s.h + h0) * s.w + w0) * s.c_in + c;
    const int64_t row_length = static_cast<int64_t>(s.w) * s.c_in;

    float x[ROWS][kStripWidth][VEC];
    float scale[VEC], shift[VEC];
    affines.read(scale, 0, vector);
    affines.read(shift, 1, vector);
#pragma unroll
    for (int y = 0; y < ROWS; ++y) {
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
        const T* source = static_cast<const T*>(p.x) + (origin + y * row_length) + j * s.c_in;
        (inside(y, j) ? Pack<T, VEC>::load(source) : Pack<T, VEC>::zero()).widen(x[y][j]);
      }
    }
#pragma unroll
    for (int y = 0; y < ROWS; ++y) {
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
        if (!inside(y, j)) continue;
#pragma unroll
        for (int v = 0; v < VEC; ++v) x[y][j][v] = fmaf(scale[v], x[y][j][v], shift[v]);
        activate(x[y][j], activation);
      }
    }

    float dx[ROWS][kStripWidth][VEC] = {};
#pragma unroll
    for (int i = 0; i < kHeight; ++i) {
      float dz[kWidth][VEC];
      const bool row_inside = static_cast<unsigned>(p0 + i) < static_cast<unsigned>(s.p);
      // A branch keeps the loads of one row apart from the next: all rows at once would spill at this size.
      if (K == 7 && !row_inside) continue;
      const T* source = static_cast<const T*>(p.dz) + ((picture * s.p + p0 + i) * s.q + q0) * s.c_mid + c;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const bool dz_inside = row_inside && static_cast<unsigned>(q0 + j) < static_cast<unsigned>(s.q);
        (dz_inside ? Pack<T, VEC>::load(source + j * s.c_mid) : Pack<T, VEC>::zero()).widen(dz[j]);
      }
      add_dz_row<K, STRIDE>(dx, dw, x, dz, i, weights, vector);
    }
    if (p.dx == nullptr && !with_sums) continue;

    // x is read again, from L1, rather than kept beside its activation.
    float centre[VEC];
    affines.read(scale, 0, vector);
    affines.read(shift, 1, vector);
    affines.read(centre, 2, vector);
#pragma unroll
    for (int y = 0; y < ROWS; ++y) {
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
        if (!inside(y, j)) continue;
        const int64_t at = origin + y * row_length + j * s.c_in;
        float (&du)[VEC] = dx[y][j];
        if (in_chain) {
          float value[VEC];
          read_pixel<T>(value, p.x, at);
          finish_gradient<T>(du, sums, p.epilogue, {p.x, p.dx, s.h, s.w, s.c_in}, {picture, h0 + y, w0 + j, at}, c,
                             value, scale, shift, activation,
                             [&](int k, float (&middle)[VEC]) { affines.read(middle, 2 + k, vector); });
          continue;
        }
        if (activation.code != Activation::kIdentity || with_sums) {
          float value[VEC], slope[VEC];
          read_pixel<T>(value, p.x, at);
#pragma unroll
          for (int v = 0; v < VEC; ++v) slope[v] = fmaf(scale[v], value[v], shift[v]);
          activation_slope(slope, activation);
#pragma unroll
          for (int v = 0; v < VEC; ++v) du[v] *= slope[v];
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            sums[0][v] = fmaf(du[v], value[v] - centre[v], sums[0][v]);
            sums[1][v] += du[v];
          }
        }
        if (p.dx == nullptr) continue;
#pragma unroll
        for (int v = 0; v < VEC; ++v) du[v] *= scale[v];
        Pack<T, VEC>::round(du).store(static_cast<T*>(p.dx) + at);
      }
    }
  }

  float* partial = p.partials + static_cast<int64_t>(blockIdx.x) * (kTaps + kMostGradientSums) * s.c_mid;
#pragma unroll
  for (int r = 0; r < K; ++r) {
    float filter_row[K][VEC];
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) filter_row[k][v] = dw[r * K + k][v];
    }
    reduce_over_strips<VEC>(filter_row, scratch, partial + static_cast<int64_t>(r) * K * s.c_mid, s.c_mid, first,
                            s.c_in, vectors, strips, active, vector, strip);
  }
  if (with_sums) {
    reduce_over_strips<VEC>(sums, scratch, partial + static_cast<int64_t>(kTaps) * s.c_mid, s.c_mid, first, s.c_in,
                            vectors, strips, active, vector, strip);
  }
}

template <class T>
void launch_depthwise_bprop(const DepthwiseBpropParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers), static_cast<unsigned>(p.plan.slices)),
                          kDepthwiseThreads, p.plan.shared_bytes};
  void (*kernel)(DepthwiseBpropParams) = nullptr;
  switch (p.shape.r * 10 + p.shape.stride_h) {
    case 31:
      kernel = depthwise_bprop_kernel<T, 3, 1, bprop_vec(3), bprop_strip_rows(1)>;
      break;
    case 32:
      kernel = depthwise_bprop_kernel<T, 3, 2, bprop_vec(3), bprop_strip_rows(2)>;
      break;
    case 51:
      kernel = depthwise_bprop_kernel<T, 5, 1, bprop_vec(5), bprop_strip_rows(1)>;
      break;
    case 52:
      kernel = depthwise_bprop_kernel<T, 5, 2, bprop_vec(5), bprop_strip_rows(2)>;
      break;
    case 71:
      kernel = depthwise_bprop_kernel<T, 7, 1, bprop_vec(7), bprop_strip_rows(1)>;
      break;
    case 72:
      kernel = depthwise_bprop_kernel<T, 7, 2, bprop_vec(7), bprop_strip_rows(2)>;
      break;
    default:
      no_such_kernel("depthwise_bprop_kernel", p);
  }
  launch(kernel, "depthwise_bprop_kernel", shape, stream, p);
}

}  // namespace xsep::cuda
