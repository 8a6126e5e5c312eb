// Which tile the fused kernel's CTA is at, and how its shared memory is laid out.
#pragma once

#include "../channels.cuh"
#include "params.h"

namespace xsep::cuda {

// z and what it is multiplied by lie in rows of one chunk (8 or 4 units of 16 bytes). The units of a row are permuted
// by the row's number, so that the 8 rows that ldmatrix reads at one unit lie in different banks.
__device__ __forceinline__ int swizzled_offset(int row, int unit, int chunk_bytes) {
  const int key = chunk_bytes == 128 ? row & 7 : (row >> 1) & 3;
  return row * chunk_bytes + ((unit ^ key) << 4);
}

// A tile of y. Rows are counted through all pictures: row v is row v % P of picture v / P.
struct FusedTile {
  int first_row, rows;
  int first_column, columns;
  int first_x_row;  // of x, through all pictures likewise: no tap of the tile lies in one above it
  // Of kFusedStripWidth pixels and up to kFusedGroupRows rows of one picture, two of them each; and how many eights of
  // channels of such a pair a warp makes.
  int pairs, share;

  __device__ int64_t first_pixel(const SeparableFpropParams& p) const {  // in y
    return static_cast<int64_t>(first_row) * p.shape.q + first_column;
  }
};
static_assert(sizeof(FusedTile) == kFusedTileBytes, "as the planner lays it out");

__device__ __forceinline__ FusedTile tile_of(const SeparableFpropParams& p, int index) {
  const SeparablePlan& plan = p.plan;
  const ConvShape& s = p.shape;
  const int down = plan.by_tiles_across.quotient(index), across = index - down * plan.tiles_across;
  const int group = plan.by_tiles_of_group.quotient(down);
  const int in_group = (down - group * plan.tiles_of_group) * plan.tile_rows;
  const int first_column = across * plan.tile_columns, first_row = group * plan.group_rows + in_group;
  const int picture = plan.by_picture_rows.quotient(first_row), in_picture = first_row - picture * s.p;
  return {first_row,
          min(plan.tile_rows, plan.group_rows - in_group),
          first_column,
          min(plan.tile_columns, s.q - first_column),
          picture * s.h + min(max(in_picture * s.stride_h - s.pad_top, 0), s.h - 1),
          0,
          0};
}

// What a CTA does from one barrier to the next is about steps: each is one chunk of one tile.
struct FusedStep {
  int tile, chunk;
  int map;  // which of the plan's maps is the tile's

  __device__ __forceinline__ bool exists(const SeparablePlan& plan) const { return tile < plan.tiles; }
  __device__ __forceinline__ void advance(const SeparablePlan& plan) {
    if (++chunk < plan.chunks) return;
    chunk = 0;
    tile += static_cast<int>(gridDim.x);
    map = map + 1 == plan.maps ? 0 : map + 1;
  }
};

// Pixels of a tile that a warp makes z of together.
struct FusedBlock {
  int strip, halo_pixel, rows;

  __device__ __forceinline__ int packed() const {
    return (rows << kFusedHaloBits | halo_pixel) << kFusedStripBits | strip;
  }
  static __device__ __forceinline__ FusedBlock unpacked(int word) {
    return {word & ((1 << kFusedStripBits) - 1), word >> kFusedStripBits & ((1 << kFusedHaloBits) - 1),
            word >> (kFusedStripBits + kFusedHaloBits)};
  }
};

// A place in shared memory that is none, and stays negative whatever buffer it is counted from.
inline constexpr int kNowhere = -(1 << 30);

// What a map says of a pixel beside its place, which is a multiple of 4.
inline constexpr int kIsOwned = 1;  // it is in the middle of one of the tile's own windows
inline constexpr int kIsPixel = 2;  // of x, not padding

struct FusedMemory {
  BufferRing halo;              // [halo_rows, halo_pitch] pixels of one chunk
  BufferRing operand;           // [operand_rows] rows of one chunk, swizzled: w_pw in the order of mma's columns, or dy
  BufferRing z;                 // [z_rows] rows of one chunk, swizzled
  SharedBuffer<uint32_t> taps;  // depthwise weights: float32 [R S, table_channels], or diagonal_word [table_channels +
                                // kFusedZeroChannels, S, R up to whole 16 bytes]
  SharedBuffer<float> vectors;  // [4, table_channels] the prologue's scale and shift, and the middle's
  // [maps, halo_rows * halo_pitch] where a pixel of the halo is in x, in elements from the start of first_x_row, with
  // kIsPixel and kIsOwned added; 0 where it is padding
  SharedBuffer<int> source;
  SharedBuffer<int> slot;        // [maps, tile_rows] the halo row of a tile row's first tap
  SharedBuffer<int> block;       // [maps, blocks_of] FusedBlock::packed; where they are odd, one of no rows follows
  SharedBuffer<FusedTile> tile;  // [maps]
  SharedBuffer<int> place;       // [pixels] a pixel's row in the tile times 65536, and its column
  SharedBuffer<int> z_place;     // [tile_rows, strips of pixels] where a pixel starts in a buffer of z, or kNowhere
  SharedBuffer<float> affine;    // [2, output channels] the epilogue's scale, and its shift with the bias in it

  // A kernel that has buffers of its own beside these goes on with the arena.
  __device__ __forceinline__ FusedMemory(const SeparableFpropParams& p, SharedArena& arena) {
    const SeparablePlan& plan = p.plan;
    const FusedLayout& layout = plan.layout;
    const int channels = plan.channel_warps * kWarpChannels;
    halo = arena.take_ring(layout.halo, plan.halos, plan.halo_rows * plan.halo_pitch * plan.pixel_bytes);
    operand = arena.take_ring(layout.operand, plan.operand_buffers, plan.operand_rows * plan.chunk_bytes);
    z = arena.take_ring(layout.z, 2, plan.z_rows * plan.chunk_bytes);
    taps = arena.take_at<uint32_t>(layout.taps, plan.tap_words);
    vectors = arena.take_at<float>(layout.vectors, 4 * plan.table_channels);
    source = arena.take_at<int>(layout.source, plan.maps * plan.halo_rows * plan.halo_pitch);
    slot = arena.take_at<int>(layout.slot, plan.maps * plan.tile_rows);
    block = arena.take_at<int>(layout.block, plan.maps * detail::blocks_of(plan));
    tile = arena.take_at<FusedTile>(layout.tile, plan.maps);
    place = arena.take_at<int>(layout.place, plan.pixels);
    z_place = arena.take_at<int>(layout.z_place, plan.tile_rows * plan.strips * kFusedStripWidth);
    affine = arena.take_at<float>(layout.affine, 2 * channels);
  }
};

// Fills in a step's map. Rows of one picture share their halo; a new picture starts its own.
template <int K, int STRIDE>
__device__ __forceinline__ void map_tile(const SeparableFpropParams& p, const FusedMemory& memory,
                                         const FusedStep& step) {
  const ConvShape& s = p.shape;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const SeparablePlan& plan = p.plan;
  const FusedTile tile = tile_of(p, step.tile);
  const int picture = plan.by_picture_rows.quotient(tile.first_row), first = tile.first_row - picture * s.p;
  const int in_first = min(tile.rows, s.p - first);  // the tile's rows in its first picture,
  const int of_first = (in_first - 1) * STRIDE + K;  // their halo's,
  const int of_whole = (s.p - 1) * STRIDE + K;       // and a whole picture's
  const int pitch = plan.halo_pitch, pixels = plan.halo_rows * pitch;
  for (int i = tid; i < pixels; i += threads) {
    const int halo_row = plan.by_halo_pitch.quotient(i), halo_column = i - halo_row * pitch;
    const bool later = halo_row >= of_first;
    const int skipped = later ? plan.by_picture_halo.quotient(halo_row - of_first) : 0;
    const int within = later ? halo_row - of_first - skipped * of_whole : halo_row;
    const int rows_before = later ? in_first + skipped * s.p : 0;
    const int rows = min(tile.rows - rows_before, later ? s.p : in_first);  // of the tile in this picture
    const int h = (later ? 0 : first * STRIDE) - s.pad_top + within;
    const int w = tile.first_column * STRIDE - s.pad_left + halo_column;
    const bool inside = rows > 0 && within < (rows - 1) * STRIDE + K &&
                        static_cast<unsigned>(h) < static_cast<unsigned>(s.h) && halo_column < plan.halo_columns &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(s.w);
    const int x_row = (picture + (later ? 1 + skipped : 0)) * s.h + h - tile.first_x_row;
    // Of interest at stride 1 alone.
    const int down = within - K / 2, across = halo_column - K / 2;
    const bool own = down >= 0 && down < rows && across >= 0 && across < tile.columns;
    memory.source[step.map * pixels + i] = inside ? (x_row * s.w + w) * s.c_in + kIsPixel + (own ? kIsOwned : 0) : 0;
  }
  for (int i = tid; i < tile.rows; i += threads) {
    memory.slot[step.map * plan.tile_rows + i] = i * STRIDE + plan.by_picture_rows.quotient(first + i) * (K - STRIDE);
  }
  const int strips = plan.strips, groups_in_first = (in_first - 1) / kFusedGroupRows + 1;
  const int groups_of_picture = (s.p - 1) / kFusedGroupRows + 1;
  int* const blocks = memory.block.get() + step.map * detail::blocks_of(plan);
  for (int i = tid; i < tile.rows * strips; i += threads) {
    const int row = plan.by_strips.quotient(i), strip = i - row * strips;
    const bool later = row >= in_first;
    const int pictures = later ? plan.by_picture_rows.quotient(row - in_first) : 0;  // whole ones before, but the first
    const int within = later ? row - in_first - pictures * s.p : row;
    const int rows = min(tile.rows - (row - within), later ? s.p : in_first);  // of the tile in this picture
    const int group = (later ? groups_in_first + pictures * groups_of_picture : 0) + within / kFusedGroupRows;
    const int halo_row = row * STRIDE + (later ? pictures + 1 : 0) * (K - STRIDE);
    const FusedBlock block{i, halo_row * pitch + strip * kFusedStripWidth * STRIDE,
                           min(rows - within, kFusedGroupRows)};
    if (within % kFusedGroupRows == 0) blocks[group * strips + strip] = block.packed();
    if (i == tile.rows * strips - 1) {
      const int count = (group + 1) * strips, pairs = (count + 1) / 2, eights = pairs * (plan.chunk_bytes / 16);
      if (count % 2 != 0) blocks[count] = FusedBlock{}.packed();
      FusedTile& mapped = memory.tile[step.map];
      mapped = tile;
      mapped.pairs = pairs, mapped.share = plan.by_warps.quotient(eights + plan.warps - 1);
    }
  }
}

// A depthwise weight as a lane has it of the 8 x 8 diagonal matrix that multiplies 8 channels: of its two neighbouring
// rows, one meets the diagonal.
template <class T>
__device__ __forceinline__ uint32_t diagonal_word(T weight, int channel) {
  uint16_t bits;
  memcpy(&bits, &weight, sizeof(bits));
  return static_cast<uint32_t>(bits) << channel % 2 * 16;
}

// What holds for all tiles. The taps and the per-channel vectors; past the last channel all zeros.
template <class T>
__device__ void load_tables(const SeparableFpropParams& p, const FusedMemory& memory) {
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int channels = p.plan.table_channels;
  const T* w_dw = static_cast<const T*>(p.w_dw);
  const int r_size = p.shape.r, s_size = p.shape.s;
  if constexpr (sizeof(T) == 2) {
    const int column = (r_size + 3) / 4 * 4;  // as detail::diagonal_taps
    for (int i = tid; i < p.plan.tap_words; i += threads) {
      const int r = i % column, s = i / column % s_size, c = i / column / s_size;
      memory.taps[i] = r < r_size && c < p.shape.c_in ? diagonal_word(w_dw[(c * r_size + r) * s_size + s], c) : 0;
    }
  } else {
    for (int i = tid; i < p.plan.tap_words; i += threads) {
      const int c = i % channels, tap = i / channels;
      reinterpret_cast<float*>(memory.taps.get())[i] = c < p.shape.c_in ? to_float(w_dw[c * r_size * s_size + tap]) : 0;
    }
  }
  float* table = memory.vectors.get();
  for (int c = tid; c < channels; c += threads) {
    const bool inside = c < p.shape.c_in;
    table[c] = inside ? channel_value<T>(p.prologue.scale, c, 1.0f) : 0.0f;
    table[channels + c] = inside ? channel_value<T>(p.prologue.shift, c, 0.0f) : 0.0f;
    table[2 * channels + c] = inside ? channel_value<T>(p.middle.scale, c, 1.0f) : 0.0f;
    table[3 * channels + c] = inside ? channel_value<T>(p.middle.shift, c, 0.0f) : 0.0f;
  }
  const int outputs = p.plan.channel_warps * kWarpChannels;
  for (int n = tid; n < outputs; n += threads) {
    const bool inside = n < p.c_out;
    const float scale = inside ? channel_value<T>(p.epilogue.scale, n, 1.0f) : 0.0f;
    const float bias = inside ? channel_value<T>(p.bias, n, 0.0f) : 0.0f;
    memory.affine[n] = scale;
    memory.affine[outputs + n] = fmaf(scale, bias, inside ? channel_value<T>(p.epilogue.shift, n, 0.0f) : 0.0f);
  }
  for (int m = tid; m < p.plan.pixels; m += threads) {
    memory.place[m] = m / p.plan.tile_columns << 16 | m % p.plan.tile_columns;
  }
  const int strip_columns = p.plan.strips * kFusedStripWidth;
  for (int i = tid; i < p.plan.tile_rows * strip_columns; i += threads) {
    const int row = i / strip_columns, column = i % strip_columns;
    const int pixel = row * p.plan.tile_columns + column;
    memory.z_place[i] = column < p.plan.tile_columns ? swizzled_offset(pixel, 0, p.plan.chunk_bytes) : kNowhere;
  }
}

}  // namespace xsep::cuda
