// Fused separable forward: depthwise into shared memory, tensor cores out of it; z never reaches global memory.
//
// A CTA walks over its tile's input channels in chunks, two chunks deep. While it computes, cp.async brings the next
// chunk's weights and the halo after the next; zero fill is the padding. One barrier a chunk: between two barriers a
// warp computes its share of the next chunk's z and multiplies its block of this chunk's, so the FMA pipe of one warp
// runs beside the tensor core of another.
//
//   barrier k | copy halo k+2, weights k+1 | depthwise: halo k+1 -> z k+1 | multiply: z k, weights k | wait
#pragma once

#include "../launch.cuh"
#include "epilogue.cuh"
#include "window.cuh"

namespace xsep::cuda {

// Calls f(piece's offset in the halo, halo row, halo column, first channel) for this thread's 16-byte pieces: the
// same ones for a copy and for what is done to it after the wait, which therefore needs no barrier between.
template <class T, class Function>
__device__ __forceinline__ void for_each_piece(const SeparablePlan& plan, Function f) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  const int units = plan.chunk_bytes / 16, step = static_cast<int>(blockDim.x) / units;
  const int unit = static_cast<int>(threadIdx.x) % units;
  int row = 0, column = static_cast<int>(threadIdx.x) / units;
  while (column >= plan.halo_columns) column -= plan.halo_columns, ++row;
  while (row < plan.halo_rows) {
    f((row * plan.halo_pitch + column) * plan.chunk_bytes + unit * 16, row, column, unit * kVec);
    column += step;
    while (column >= plan.halo_columns) column -= plan.halo_columns, ++row;
  }
}

template <class T>
struct Halo {
  const SeparableFpropParams& p;
  const FusedTile& tile;
  const FusedMemory& memory;

  __device__ bool inside(int row, int column, int c, int64_t& source) const {
    const int w = tile.first_column * p.shape.stride_w - p.shape.pad_left + column;
    source = memory.halo_source[row];
    if (source < 0 || w < 0 || w >= p.shape.w || c >= p.shape.c_in) return false;
    source = source / 2 + static_cast<int64_t>(w) * p.shape.c_in + c;
    return true;
  }

  __device__ void copy(int chunk) const {
    unsigned char* buffer = memory.halo[chunk];
    const int first = chunk * (p.plan.chunk_bytes / static_cast<int>(sizeof(T)));
    for_each_piece<T>(p.plan, [&](int at, int row, int column, int c) {
      int64_t source;
      const bool valid = inside(row, column, first + c, source);
      cp_async_16(buffer + at, static_cast<const T*>(p.x) + (valid ? source : 0), valid);
    });
  }

  // Whether the tile writes x_pre of a pixel: each is in the middle of one tile's window.
  __device__ bool owns(int row, int column) const {
    const int middle = column - p.shape.s / 2;
    return middle >= 0 && middle < tile.columns && memory.halo_source[row] % 2 != 0;
  }

  // Applies the prologue where there is a pixel; padding stays zero.
  __device__ void transform(int chunk) const {
    constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kHalf = kVec / 2;
    unsigned char* buffer = memory.halo[chunk];
    const int first = chunk * (p.plan.chunk_bytes / static_cast<int>(sizeof(T)));
    const float* scale = memory.taps.get() + p.shape.r * p.shape.s * p.plan.table_channels;
    const float* shift = scale + p.plan.table_channels;
    for_each_piece<T>(p.plan, [&](int at, int row, int column, int c) {
      int64_t source;
      if (!inside(row, column, first + c, source)) return;
      // In halves: the accumulators leave few registers.
#pragma unroll 1
      for (int half = 0; half < kVec; half += kHalf) {
        T* piece = reinterpret_cast<T*>(buffer + at) + half;
        float u[kHalf];
        Pack<T, kHalf>::load(piece).widen(u);
        const auto a = Pack<float, kHalf>::load(scale + first + c + half);
        const auto b = Pack<float, kHalf>::load(shift + first + c + half);
#pragma unroll
        for (int v = 0; v < kHalf; ++v) u[v] = fmaf(a.v[v], u[v], b.v[v]);
        if (p.addend != nullptr) {
          float other[kHalf];
          Pack<T, kHalf>::load(static_cast<const T*>(p.addend) + source + half).widen(other);
#pragma unroll
          for (int v = 0; v < kHalf; ++v) u[v] += other[v];
          // The activation sees the sum as it is stored, so that a backward that reads it finds the same signs.
          const auto sum = Pack<T, kHalf>::round(u);
          if (owns(row, column)) sum.store(static_cast<T*>(p.x_pre) + source + half);
          sum.widen(u);
        }
        activate(u, {p.prologue.activation, p.prologue.alpha});
        Pack<T, kHalf>::round(u).store(piece);
      }
    });
  }
};

template <class T>
__device__ __forceinline__ void copy_w_pw(const SeparableFpropParams& p, unsigned char* buffer, int chunk) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  const int units = p.plan.chunk_bytes / 16, rows = p.plan.channel_warps * kWarpChannels;
  const int unit = static_cast<int>(threadIdx.x) % units, c = (chunk * units + unit) * kVec;
  for (int n = static_cast<int>(threadIdx.x) / units; n < rows; n += static_cast<int>(blockDim.x) / units) {
    const bool valid = n < p.c_out && c < p.shape.c_in;
    const T* source = static_cast<const T*>(p.w_pw) + (valid ? static_cast<int64_t>(n) * p.shape.c_in + c : 0);
    cp_async_16(buffer + swizzled_offset(n, unit, p.plan.chunk_bytes), source, valid);
  }
}

// z of one chunk: strips of kStripWidth pixels, 8 bytes of channels a thread; 4 bytes for the larger filter, whose row
// of weights takes more registers.
template <class T, int K, int STRIDE>
__device__ __forceinline__ void depthwise_chunk(const SeparableFpropParams& p, const FusedTile& tile,
                                                const FusedMemory& memory, int chunk) {
  constexpr int kVec = (K == 3 ? 8 : 4) / static_cast<int>(sizeof(T));
  constexpr int kBytes = kVec * static_cast<int>(sizeof(T));
  static_assert(16 % kBytes == 0, "a vector lies in one unit");
  const SeparablePlan& plan = p.plan;
  const int vectors = plan.chunk_bytes / kBytes, table = plan.table_channels;
  const int vector = static_cast<int>(threadIdx.x) % vectors;
  const int strips_across = (plan.tile_columns + kStripWidth - 1) / kStripWidth;
  const int strips = tile.rows * strips_across;
  const float* taps = memory.taps.get() + chunk * vectors * kVec + vector * kVec;
  for (int strip = static_cast<int>(threadIdx.x) / vectors; strip < strips;
       strip += static_cast<int>(blockDim.x) / vectors) {
    const int row = strip / strips_across, column = strip % strips_across * kStripWidth;
    const int corner = memory.slot[row] * plan.halo_pitch + column * STRIDE;
    const unsigned char* source = memory.halo[chunk] + corner * plan.chunk_bytes + vector * kBytes;
    float sum[kStripWidth][kVec] = {};
    slide_window<T, K, STRIDE>(sum, source, plan.chunk_bytes, plan.halo_pitch * plan.chunk_bytes, taps, table);
    if (p.has_middle != 0) {
      const auto scale = Pack<float, kVec>::load(taps + (K * K + 2) * table);
      const auto shift = Pack<float, kVec>::load(taps + (K * K + 3) * table);
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[j][v] = fmaf(scale.v[v], sum[j][v], shift.v[v]);
      }
      activate_groups(sum, {p.middle.activation, p.middle.alpha});
    }
#pragma unroll
    for (int j = 0; j < kStripWidth; ++j) {
      if (column + j >= plan.tile_columns) break;
      const int pixel = row * plan.tile_columns + column + j;
      unsigned char* out = memory.z[chunk] + swizzled_offset(pixel, vector * kBytes / 16, plan.chunk_bytes);
      Pack<T, kVec>::round(sum[j]).store(reinterpret_cast<T*>(out + vector * kBytes % 16));
    }
  }
}

template <class Policy, int K, int STRIDE>
__global__ void __launch_bounds__(kFusedThreads)
    separable_fprop_kernel(const __grid_constant__ SeparableFpropParams p) {
  using T = typename Policy::T;
  const FusedTile tile(p, blockIdx.x);
  const FusedMemory memory(p);
  const Halo<T> halo{p, tile, memory};
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int block = warp % kRowWarps * kWarpPixels, channel = warp / kRowWarps * kWarpChannels;

  map_halo<K, STRIDE>(p, tile, memory);
  __syncthreads();
  halo.copy(0);
  cp_async_commit();
  load_tables<T>(p, memory);
  copy_w_pw<T>(p, memory.w_pw[0], 0);
  if (p.plan.chunks > 1) halo.copy(1);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<1>();
  if (p.has_prologue != 0) halo.transform(0);
  __syncthreads();
  depthwise_chunk<T, K, STRIDE>(p, tile, memory, 0);

  Accumulators accumulators = {};
#pragma unroll 1
  for (int chunk = 0; chunk < p.plan.chunks; ++chunk) {
    cp_async_wait<0>();
    const bool more = chunk + 1 < p.plan.chunks;
    if (more && p.has_prologue != 0) halo.transform(chunk + 1);
    __syncthreads();
    if (chunk + 2 < p.plan.chunks) halo.copy(chunk + 2);
    if (more) copy_w_pw<T>(p, memory.w_pw[chunk + 1], chunk + 1);
    cp_async_commit();
    if (more) depthwise_chunk<T, K, STRIDE>(p, tile, memory, chunk + 1);
    multiply_chunk<Policy>(accumulators, memory.z[chunk], memory.w_pw[chunk], p.plan.chunk_bytes, block, channel);
  }
  // Found again rather than kept through the loop, where registers are scarce.
  finish_tile<T>(p, FusedTile(p, block_index_again()), memory, accumulators, block, channel);
}

template <class Policy>
void launch_separable_fprop(const SeparableFpropParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.tiles)), 32 * kRowWarps * p.plan.channel_warps,
                          p.plan.shared_bytes};
  void (*kernel)(SeparableFpropParams) = nullptr;
  switch (p.shape.r * 10 + p.shape.stride_h) {
    case 31:
      kernel = separable_fprop_kernel<Policy, 3, 1>;
      break;
    case 32:
      kernel = separable_fprop_kernel<Policy, 3, 2>;
      break;
    case 51:
      kernel = separable_fprop_kernel<Policy, 5, 1>;
      break;
    case 52:
      kernel = separable_fprop_kernel<Policy, 5, 2>;
      break;
    default:
      no_such_kernel("separable_fprop_kernel", p);
  }
  SeparableFpropParams completed = p;
  completed.has_prologue = p.prologue.is_identity() && p.addend == nullptr ? 0 : 1;
  completed.has_middle = p.middle.is_identity() ? 0 : 1;
  launch(kernel, "separable_fprop_kernel", shape, stream, completed);
}

}  // namespace xsep::cuda
