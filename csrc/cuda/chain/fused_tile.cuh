// Where the CTA of a layer's fused backward stands, and how its shared memory is laid out.
#pragma once

#include "../channels.cuh"
#include "params.h"

namespace xsep::cuda {

inline constexpr int kHaloColumns = kChainTileColumns + 2;

// A tile of a picture; all pictures are H x W.
struct ChainTile {
  int64_t picture;
  int row, column;  // its first pixel

  __device__ ChainTile(const ChainBackwardPlan& plan, int tile) {
    const int down = tile / plan.tiles_across;
    picture = down / plan.tiles_down;
    row = down % plan.tiles_down * plan.tile_rows;
    column = tile % plan.tiles_across * kChainTileColumns;
  }

  // Elements from an image's first to the tile's first.
  __device__ __forceinline__ int64_t origin(const ConvShape& s, int channels) const {
    return ((picture * s.h + row) * s.w + column) * channels;
  }
};

// The tile's rows and columns, one more all around where there is a halo; a pixel's channels are `pitch` bytes from the
// next pixel's.
struct FusedBackwardMemory {
  SharedBuffer<unsigned char> dr;    // with halo, C_out; zero outside the picture and past the last channel
  SharedBuffer<unsigned char> x;     // with halo, C_in: act(scale x + shift), zero outside the picture
  SharedBuffer<unsigned char> z;     // C_in
  SharedBuffer<unsigned char> dz;    // with halo, C_in
  SharedBuffer<unsigned char> w_pw;  // [C_out], C_in; zero past the last channels
  SharedBuffer<float> taps;          // [9, C_in]
  SharedBuffer<float> affines;       // [2 + kMostOperands, C_in]: scale, shift, the operands' centres
  SharedBuffer<float> coef;          // [3, C_out]

  __device__ __forceinline__ explicit FusedBackwardMemory(const FusedBackwardParams& p) {
    const ChainBackwardPlan& plan = p.plan;
    const int c_in = p.depthwise.shape.c_in;
    SharedArena arena;
    dr = arena.take_at<unsigned char>(plan.layout.dr, plan.dr_bytes);
    x = arena.take_at<unsigned char>(plan.layout.x, plan.halo_pixels * plan.pitch_in);
    z = arena.take_at<unsigned char>(plan.layout.z, plan.tile_rows * kChainTileColumns * plan.pitch_in);
    dz = arena.take_at<unsigned char>(plan.layout.dz, plan.halo_pixels * plan.pitch_in);
    w_pw = arena.take_at<unsigned char>(plan.layout.w_pw, plan.blocks_out * kChainBlock * plan.pitch_in);
    taps = arena.take_at<float>(plan.layout.taps, 9 * c_in);
    affines = arena.take_at<float>(plan.layout.affines, (2 + kMostOperands) * c_in);
    coef = arena.take_at<float>(plan.layout.coef, 3 * p.gradient.shape.c);
  }
};

// A thread's place over units of 16 bytes of channels (fastest), then pixels: lane, lane + lanes and so on; none where
// it is left over. Found again in every step rather than kept from tile to tile, where registers are scarce.
struct UnitThread {
  int unit, lane, lanes;

  __device__ __forceinline__ explicit UnitThread(int blocks) {
    const int thread = static_cast<int>(thread_index_again()), units = blocks * (kChainBlock / 8);
    unit = thread % units, lane = thread / units;
    lanes = kChainThreads / units;
    if (lane >= lanes) lane = 1 << 30;
  }
};

// The same for the depthwise steps: kChainVec channels, then strips of kStripWidth pixels.
struct StripThread {
  int vectors, vector, lane, lanes;
  bool active;

  __device__ __forceinline__ explicit StripThread(int channels) {
    const int thread = static_cast<int>(thread_index_again());
    vectors = channels / kChainVec;
    vector = thread % vectors, lane = thread / vectors;
    lanes = kChainThreads / vectors;
    active = lane < lanes;
  }
};

}  // namespace xsep::cuda
