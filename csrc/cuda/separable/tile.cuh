// Where the fused kernel's CTA stands, and how its shared memory is laid out.
#pragma once

#include "../channels.cuh"
#include "params.h"

namespace xsep::cuda {

// z and w_pw lie in rows of one chunk (8 or 4 units of 16 bytes). The units of a row are permuted by the row's number,
// so that the 8 rows that ldmatrix reads at one unit lie in different banks.
__device__ __forceinline__ int swizzled_offset(int row, int unit, int chunk_bytes) {
  const int key = chunk_bytes == 128 ? row & 7 : (row >> 1) & 3;
  return row * chunk_bytes + ((unit ^ key) << 4);
}

// The CTA's tile of y. Rows are counted through all pictures: row v is row v % P of picture v / P.
struct FusedTile {
  int first_row, rows;
  int first_column, columns;

  __device__ FusedTile(const SeparableFpropParams& p, unsigned block) {
    const SeparablePlan& plan = p.plan;
    const int across = static_cast<int>(block) % plan.tiles_across;
    const int down = static_cast<int>(block) / plan.tiles_across;
    const int group = down / plan.tiles_of_group, in_group = down % plan.tiles_of_group * plan.tile_rows;
    first_row = group * plan.group_rows + in_group;
    rows = min(plan.tile_rows, plan.group_rows - in_group);
    first_column = across * plan.tile_columns;
    columns = min(plan.tile_columns, p.shape.q - first_column);
  }

  __device__ int pixels() const { return rows * columns; }
  __device__ int64_t first_pixel(const SeparableFpropParams& p) const {  // in y
    return static_cast<int64_t>(first_row) * p.shape.q + first_column;
  }
};

// Two buffers used in turn.
struct BufferPair {
  SharedBuffer<unsigned char> even, odd;
  __device__ __forceinline__ unsigned char* operator[](int chunk) const {
    return shared_base() + (chunk % 2 == 0 ? even.place : odd.place);
  }
};

struct FusedMemory {
  BufferPair halo;           // [halo_rows, halo_pitch] pixels of one chunk
  BufferPair w_pw;           // [output channels] rows of one chunk, swizzled
  BufferPair z;              // [kFusedPixels] rows of one chunk, swizzled
  SharedBuffer<float> taps;  // [R S, table_channels], then 4 rows: prologue's and middle's scale and shift
  // [halo_rows] first element of the row of x, times 2, and 1 added where its pixels are in the middle of the tile's
  // own windows; -1 for a row of zeros
  SharedBuffer<int64_t> halo_source;
  SharedBuffer<int> slot;      // [tile_rows] the halo row of a tile row's first tap
  SharedBuffer<float> affine;  // [2, output channels] the epilogue's scale, and its shift with the bias in it
  SharedBuffer<float> sums;    // [kRowWarps, output channels]

  __device__ __forceinline__ explicit FusedMemory(const SeparableFpropParams& p) {
    const SeparablePlan& plan = p.plan;
    const FusedLayout& layout = plan.layout;
    const int channels = plan.channel_warps * kWarpChannels;
    SharedArena arena;
    const auto pair = [&](const int (&places)[2], int bytes) {
      const auto even = arena.take_at<unsigned char>(places[0], bytes);
      return BufferPair{even, arena.take_at<unsigned char>(places[1], bytes)};
    };
    halo = pair(layout.halo, plan.halo_rows * plan.halo_pitch * plan.chunk_bytes);
    w_pw = pair(layout.w_pw, channels * plan.chunk_bytes);
    z = pair(layout.z, kFusedPixels * plan.chunk_bytes);
    taps = arena.take_at<float>(layout.taps, (p.shape.r * p.shape.s + 4) * plan.table_channels);
    halo_source = arena.take_at<int64_t>(layout.halo_source, plan.halo_rows);
    slot = arena.take_at<int>(layout.slot, plan.tile_rows);
    affine = arena.take_at<float>(layout.affine, 2 * channels);
    sums = arena.take_at<float>(layout.sums, kRowWarps * channels);
  }
};

// Fills halo_source and slot. Rows of one picture share their halo; a new picture starts its own.
template <int K, int STRIDE>
__device__ void map_halo(const SeparableFpropParams& p, const FusedTile& tile, const FusedMemory& memory) {
  const ConvShape& s = p.shape;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int slot = tid; slot < p.plan.halo_rows; slot += threads) {
    int64_t picture = tile.first_row / s.p;
    int row = tile.first_row % s.p, base = 0;
    int64_t source = -1;
    for (int i = 0; i < tile.rows; ++i) {
      const int h = row * STRIDE - s.pad_top + slot - base;
      if (slot >= base && slot < base + K && h >= 0 && h < s.h) {
        const int64_t own = slot == base + K / 2 || (source >= 0 && source % 2 != 0) ? 1 : 0;
        source = (picture * s.h + h) * s.w * s.c_in * 2 + own;
      }
      base += STRIDE;
      if (++row == s.p) row = 0, ++picture, base += K - STRIDE;
    }
    memory.halo_source[slot] = source;
  }
  const int first = tile.first_row % s.p;
  for (int i = tid; i < tile.rows; i += threads) memory.slot[i] = i * STRIDE + (first + i) / s.p * (K - STRIDE);
}

// The taps and the per-channel vectors in float32; past the last channel all zeros.
template <class T>
__device__ void load_tables(const SeparableFpropParams& p, const FusedMemory& memory) {
  const int taps = p.shape.r * p.shape.s, channels = p.plan.table_channels;
  const T* w_dw = static_cast<const T*>(p.w_dw);
  float* table = memory.taps.get();
  for (int i = static_cast<int>(threadIdx.x); i < channels * taps; i += static_cast<int>(blockDim.x)) {
    const int c = i / taps, tap = i % taps;
    table[tap * channels + c] = c < p.shape.c_in ? to_float(w_dw[i]) : 0.0f;
  }
  table += taps * channels;
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    const bool inside = c < p.shape.c_in;
    table[c] = inside ? channel_value<T>(p.prologue.scale, c, 1.0f) : 0.0f;
    table[channels + c] = inside ? channel_value<T>(p.prologue.shift, c, 0.0f) : 0.0f;
    table[2 * channels + c] = inside ? channel_value<T>(p.middle.scale, c, 1.0f) : 0.0f;
    table[3 * channels + c] = inside ? channel_value<T>(p.middle.shift, c, 0.0f) : 0.0f;
  }
  const int outputs = p.plan.channel_warps * kWarpChannels;
  for (int n = static_cast<int>(threadIdx.x); n < outputs; n += static_cast<int>(blockDim.x)) {
    const bool inside = n < p.c_out;
    const float scale = inside ? channel_value<T>(p.epilogue.scale, n, 1.0f) : 0.0f;
    const float bias = inside ? channel_value<T>(p.bias, n, 0.0f) : 0.0f;
    memory.affine[n] = scale;
    memory.affine[outputs + n] = fmaf(scale, bias, inside ? channel_value<T>(p.epilogue.shift, n, 0.0f) : 0.0f);
  }
}

}  // namespace xsep::cuda
