// A layer's backward in one pass: du, r and x once through memory, dx written once; dr, z and dz stay in shared memory.
//
// A CTA goes from tile to tile. Registers hold its sums of dw_pw, dw_dw and dx from the first to the last; they leave
// as one partial, and second kernels add the partials. Between two barriers are steps that do not touch each other's
// results, one on the FMA pipe and one on the tensor cores, so that warps can be in different ones:
//
//   dr, act(x) with halo | barrier | z, dz with halo | barrier | dw_pw, and dx with dw_dw | barrier
#pragma once

#include "../depthwise/strip.cuh"
#include "../gradient_epilogue.cuh"
#include "../launch.cuh"
#include "../separable/window.cuh"
#include "fused_multiply.cuh"
#include "raw_gradient.cuh"

namespace xsep::cuda {

inline constexpr int kStripsAcross = kChainTileColumns / kStripWidth;
static_assert(kChainTileColumns % kStripWidth == 0, "a tile's rows are whole strips");

// The pointwise weights as they lie in shared memory, and the tables.
template <class T>
__device__ void load_weights_and_tables(const FusedBackwardParams& p, const FusedBackwardMemory& memory) {
  const int outputs = p.gradient.shape.c, inputs = p.depthwise.shape.c_in;
  const UnitThread thread(p.plan.blocks_in);
  for (int row = thread.lane; row < p.plan.blocks_out * kChainBlock; row += thread.lanes) {
    const bool inside = row < outputs && thread.unit * 8 < inputs;
    const T* source = static_cast<const T*>(p.w_pw) + row * inputs + thread.unit * 8;
    T* out = reinterpret_cast<T*>(memory.w_pw.get() + row * p.plan.pitch_in + thread.unit * 16);
    (inside ? Pack<T, 8>::load(source) : Pack<T, 8>::zero()).store(out);
  }
  const int vectors = inputs / kChainVec;
  load_weights<T>(ChannelTable<kChainVec>(memory.taps, vectors), p.depthwise.w_dw, 9, 0, inputs, vectors);
  const ChannelTable<kChainVec> affines(memory.affines, vectors);
  load_channel_vector<T>(affines, 0, p.depthwise.prologue.scale, 1.0f, 0, inputs, vectors);
  load_channel_vector<T>(affines, 1, p.depthwise.prologue.shift, 0.0f, 0, inputs, vectors);
  const GradientEpilogue& epilogue = p.depthwise.epilogue;
  for (int k = 0; k < kMostOperands; ++k) {
    const float* centres = k + 1 < epilogue.sums ? epilogue.centres + (k + 1) * inputs : nullptr;
    load_channel_vector<T>(affines, 2 + k, ChannelVector{centres, 1}, 0.0f, 0, inputs, vectors);
  }
  for (int i = static_cast<int>(threadIdx.x); i < 3 * outputs; i += kChainThreads) memory.coef[i] = p.gradient.coef[i];
}

// Eight channels' values of a table in shared memory.
__device__ __forceinline__ void read_unit(float (&out)[8], const float* table) {
#pragma unroll
  for (int v = 0; v < 8; v += 4) {
    const auto part = Pack<float, 4>::load(table + v);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[v + i] = part.v[i];
  }
}

// dr of the tile and its halo, rounded as it would be in memory.
template <class T>
__device__ __forceinline__ void form_dr(const FusedBackwardParams& p, const ChainTile& tile,
                                        const FusedBackwardMemory& memory) {
  const ImageShape& s = p.gradient.shape;
  const UnitThread thread(p.plan.blocks_out);
  const int c = thread.unit * 8;
  float coef[3][8] = {};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (c < s.c) read_unit(coef[i], memory.coef.get() + i * s.c + c);
  }
  const int64_t origin = tile.origin(p.depthwise.shape, s.c) + c;
#pragma unroll 1
  for (int pixel = thread.lane; pixel < p.plan.halo_pixels; pixel += thread.lanes) {
    const int i = pixel / kHaloColumns - 1, j = pixel % kHaloColumns - 1;
    const int row = tile.row + i, column = tile.column + j;
    const bool inside = c < s.c && static_cast<unsigned>(row) < static_cast<unsigned>(s.h) &&
                        static_cast<unsigned>(column) < static_cast<unsigned>(s.w);
    float dr[8] = {};
    if (inside) {
      const int64_t at = origin + (i * s.w + j) * s.c;
      float du[8];
      read_pixel<T>(dr, p.gradient.r, at);
      if (p.gradient.taps == nullptr) {
        read_pixel<T>(du, p.gradient.du, at);
      } else {
        gather_windows<T>(du, p.gradient, tile.picture, row, column, c);
      }
      form_raw_gradient(dr, du, coef);
    }
    write_pixel<T>(memory.dr.get() + pixel * p.plan.pitch_out, c, dr);
  }
}

// act(scale x + shift) of the tile and its halo. Outside the picture it is the padding, zero.
template <class T>
__device__ __forceinline__ void load_x(const FusedBackwardParams& p, const ChainTile& tile,
                                       const FusedBackwardMemory& memory) {
  const ConvShape& s = p.depthwise.shape;
  const UnitThread thread(p.plan.blocks_in);
  const int c = thread.unit * 8;
  if (c >= s.c_in) return;
  float scale[8], shift[8];
  read_unit(scale, memory.affines.get() + c);
  read_unit(shift, memory.affines.get() + s.c_in + c);
  const int64_t origin = tile.origin(s, s.c_in) + c;
#pragma unroll 1
  for (int pixel = thread.lane; pixel < p.plan.halo_pixels; pixel += thread.lanes) {
    const int i = pixel / kHaloColumns - 1, j = pixel % kHaloColumns - 1;
    auto out = Pack<T, 8>::zero();
    if (static_cast<unsigned>(tile.row + i) < static_cast<unsigned>(s.h) &&
        static_cast<unsigned>(tile.column + j) < static_cast<unsigned>(s.w)) {
      const auto x = Pack<T, 8>::load(static_cast<const T*>(p.depthwise.x) + origin + (i * s.w + j) * s.c_in);
      float u[8];
      x.widen(u);
#pragma unroll
      for (int v = 0; v < 8; ++v) u[v] = fmaf(scale[v], u[v], shift[v]);
      activate(u, {p.depthwise.prologue.activation, p.depthwise.prologue.alpha});
      out = Pack<T, 8>::round(u);
    }
    out.store(reinterpret_cast<T*>(memory.x.get() + pixel * p.plan.pitch_in) + c);
  }
}

// z of the tile, zero outside the picture: windows there may reach into it, and what overflows would be NaN times dr.
template <class T>
__device__ __forceinline__ void form_z(const FusedBackwardParams& p, const ChainTile& tile,
                                       const FusedBackwardMemory& memory) {
  const ChainBackwardPlan& plan = p.plan;
  const StripThread thread(p.depthwise.shape.c_in);
  if (!thread.active) return;
  const int channels = thread.vector * kChainVec;
#pragma unroll 1
  for (int strip = thread.lane; strip < plan.tile_rows * kStripsAcross; strip += thread.lanes) {
    const int row = strip / kStripsAcross, column = strip % kStripsAcross * kStripWidth;
    const unsigned char* source = memory.x.get() + (row * kHaloColumns + column) * plan.pitch_in + channels * 2;
    float z[kStripWidth][kChainVec] = {};
    if (tile.row + row < p.depthwise.shape.h) {
      slide_window<T, 3, 1>(z, source, plan.pitch_in, kHaloColumns * plan.pitch_in, memory.taps.get() + channels,
                            p.depthwise.shape.c_in);
      Columns<kStripWidth>{tile.column + column, p.depthwise.shape.w}.clear_others(z);
    }
    unsigned char* out = memory.z.get() + (row * kChainTileColumns + column) * plan.pitch_in;
#pragma unroll
    for (int j = 0; j < kStripWidth; ++j) write_pixel<T>(out + j * plan.pitch_in, channels, z[j]);
  }
}

// A thread's sums over its strips.
struct StripSums {
  float dw[9][kChainVec];
  float sums[kMostGradientSums][kChainVec];
};

// dx of the tile; dw_dw and the sums.
template <class T>
__device__ __forceinline__ void form_dx(StripSums& total, const FusedBackwardParams& p, const ChainTile& tile,
                                        const FusedBackwardMemory& memory) {
  const ConvShape& s = p.depthwise.shape;
  const ChainBackwardPlan& plan = p.plan;
  const StripThread thread(s.c_in);
  if (!thread.active) return;
  const int c = thread.vector * kChainVec;
  const ChannelTable<kChainVec> weights(memory.taps, thread.vectors), affines(memory.affines, thread.vectors);
  const ActivationChoice activation{p.depthwise.prologue.activation, p.depthwise.prologue.alpha};
  const int64_t origin = tile.origin(s, s.c_in) + c;
#pragma unroll 1
  for (int strip = thread.lane; strip < plan.tile_rows * kStripsAcross; strip += thread.lanes) {
    const int i = strip / kStripsAcross, j = strip % kStripsAcross * kStripWidth;
    const int row = tile.row + i, column = tile.column + j;
    if (row >= s.h || column >= s.w) continue;
    const int64_t at = origin + (i * s.w + j) * s.c_in;
    // x itself, from L2, on its way while the windows are slid.
    PixelRow<T, kChainVec, kStripWidth> raw;
    raw.load(static_cast<const T*>(p.depthwise.x) + at, s.c_in, {column, s.w});
    float x[1][kStripWidth][kChainVec], dx[1][kStripWidth][kChainVec] = {};
    const unsigned char* source = memory.x.get() + ((i + 1) * kHaloColumns + j + 1) * plan.pitch_in;
#pragma unroll
    for (int k = 0; k < kStripWidth; ++k) read_pixel<T>(x[0][k], source + k * plan.pitch_in, c);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      constexpr int kWidth = DzReach<3, 1>::kWidth;
      float dz[kWidth][kChainVec];
      source = memory.dz.get() + ((i + k) * kHaloColumns + j) * plan.pitch_in;
#pragma unroll
      for (int l = 0; l < kWidth; ++l) read_pixel<T>(dz[l], source + l * plan.pitch_in, c);
      add_dz_row<3, 1>(dx, total.dw, x, dz, k, weights, thread.vector);
    }
    float scale[kChainVec], shift[kChainVec];
    affines.read(scale, 0, thread.vector);
    affines.read(shift, 1, thread.vector);
    // Half by half: all at once take more registers than are left.
    constexpr int kHalf = kStripWidth / 2;
#pragma unroll
    for (int k = 0; k < kStripWidth; k += kHalf) {
      float pixel[kHalf][kChainVec], gradient[kHalf][kChainVec];
#pragma unroll
      for (int l = 0; l < kHalf; ++l) {
        raw.pixel[k + l].widen(pixel[l]);
#pragma unroll
        for (int v = 0; v < kChainVec; ++v) gradient[l][v] = dx[0][k + l][v];
      }
      finish_gradient<T>(gradient, total.sums, p.depthwise.epilogue, {p.depthwise.x, p.depthwise.dx, s.h, s.w, s.c_in},
                         {tile.picture, row, column + k, at + k * s.c_in}, c, pixel, scale, shift, activation,
                         [&](int m, float (&centre)[kChainVec]) { affines.read(centre, 2 + m, thread.vector); });
    }
  }
}

// Adds the threads' sums and leaves them in the CTA's row of the partials; dr's place is free by then.
__device__ __forceinline__ void store_sums(const StripSums& total, const FusedBackwardParams& p,
                                           const FusedBackwardMemory& memory) {
  const int channels = p.depthwise.shape.c_in;
  const StripThread thread(channels);
  const SharedBuffer<float> scratch{memory.dr.place};
  float* partial = p.depthwise.partials + static_cast<int64_t>(blockIdx.x) * (9 + kMostGradientSums) * channels;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float rows[3][kChainVec];
    static_assert(kMostGradientSums == 3, "the sums are a row like the filter's three");
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int v = 0; v < kChainVec; ++v) rows[k][v] = r < 3 ? total.dw[r * 3 + k][v] : total.sums[k][v];
    }
    reduce_over_strips<kChainVec>(rows, scratch, partial + r * 3 * channels, channels, 0, channels, thread.vectors,
                                  thread.lanes, thread.vector, thread.lane);
  }
}

template <class T>
__global__ void __launch_bounds__(kChainThreads, 1)
    fused_backward_kernel(const __grid_constant__ FusedBackwardParams p) {
  const FusedBackwardMemory memory(p);
  load_weights_and_tables<T>(p, memory);
  __syncthreads();
  ChainBlock dw_pw = {};
  StripSums total = {};
#pragma unroll 1
  for (int number = static_cast<int>(blockIdx.x); number < p.plan.tiles; number += static_cast<int>(gridDim.x)) {
    const ChainTile tile(p.plan, number);
    form_dr<T>(p, tile, memory);
    load_x<T>(p, tile, memory);
    __syncthreads();
    form_z<T>(p, tile, memory);
    form_dz<T>(p.plan, memory);
    __syncthreads();
    add_to_dw_pw<T>(dw_pw, p.plan, memory);
    form_dx<T>(total, p, tile, memory);
    __syncthreads();
  }
  store_dw_pw(dw_pw, p);
  store_sums(total, p, memory);
}

template <class T>
void launch_fused_backward(const FusedBackwardParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers)), kChainThreads, p.plan.shared_bytes};
  launch(fused_backward_kernel<T>, "fused_backward_kernel", shape, stream, p);
}

}  // namespace xsep::cuda
