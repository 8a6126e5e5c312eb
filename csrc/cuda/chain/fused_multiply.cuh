// The two products of a layer's fused backward, a warp's block of kChainBlock x kChainBlock at a time, out of shared
// memory: dz = dr w_pw, and dw_pw += dr^T z.
#pragma once

#include "fused_tile.cuh"

namespace xsep::cuda {

inline constexpr int kBlockRows = kChainBlock / 16;
inline constexpr int kBlockColumns = kChainBlock / 8;

// [i][j][e]: row 16 i + lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2.
using ChainBlock = float[kBlockRows][kBlockColumns][4];

// sum += a b over 16 of what both share. b: this lane's unit of the matrix whose rows are those 16: rows of ldmatrix
// are rows of the matrix, so it is transposed on the way.
template <class T>
__device__ __forceinline__ void multiply_step(ChainBlock& sum, const uint32_t (&a)[kBlockRows][4],
                                              const unsigned char* b) {
#pragma unroll
  for (int j = 0; j < kBlockColumns; j += 2) {
    uint32_t pair[4];
    ldmatrix_x4_transposed(pair, b + j * 16);
    const uint32_t left[2] = {pair[0], pair[1]}, right[2] = {pair[2], pair[3]};
#pragma unroll
    for (int i = 0; i < kBlockRows; ++i) {
      mma_m16n8k16(sum[i][j], a[i], left, T());
      mma_m16n8k16(sum[i][j + 1], a[i], right, T());
    }
  }
}

// dz of the tile and its halo, rounded as it would be in memory.
template <class T>
__device__ __forceinline__ void form_dz(const ChainBackwardPlan& plan, const FusedBackwardMemory& memory) {
  const int lane = static_cast<int>(thread_index_again()) % 32, last = plan.halo_pixels - 1;
  const int blocks = (plan.halo_pixels + kChainBlock - 1) / kChainBlock * plan.blocks_in;
#pragma unroll 1
  for (int block = static_cast<int>(thread_index_again()) / 32; block < blocks; block += kChainWarps) {
    const int pixel = block / plan.blocks_in * kChainBlock, channel = block % plan.blocks_in * kChainBlock;
    const unsigned char* a[kBlockRows];
#pragma unroll
    for (int i = 0; i < kBlockRows; ++i) {
      // Past the last pixel comes that one again, and is not stored.
      a[i] = memory.dr.get() + min(pixel + i * 16 + lane % 16, last) * plan.pitch_out + lane / 16 * 16;
    }
    const unsigned char* b = memory.w_pw.get() + lane % 16 * plan.pitch_in + (channel + lane / 16 * 8) * 2;
    ChainBlock sum = {};
#pragma unroll 1
    for (int step = 0; step < plan.blocks_out * (kChainBlock / 16); ++step) {
      uint32_t fragments[kBlockRows][4];
#pragma unroll
      for (int i = 0; i < kBlockRows; ++i) ldmatrix_x4(fragments[i], a[i] + step * 32);
      multiply_step<T>(sum, fragments, b + step * 16 * plan.pitch_in);
    }
#pragma unroll
    for (int i = 0; i < kBlockRows * 2; ++i) {
      const int row = pixel + i * 8 + lane / 4;
      if (row > last) continue;
      unsigned char* out = memory.dz.get() + row * plan.pitch_in + (channel + lane % 4 * 2) * 2;
#pragma unroll
      for (int j = 0; j < kBlockColumns; ++j) {
        const float pair[2] = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
        Pack<T, 2>::round(pair).store(reinterpret_cast<T*>(out + j * 16));
      }
    }
  }
}

// The block of dw_pw that a warp holds, and which rows of pixels it adds to it; none where it is left over.
struct WeightBlock {
  int share, c_out, c_in;

  __device__ __forceinline__ explicit WeightBlock(const ChainBackwardPlan& plan) {
    const int warp = static_cast<int>(thread_index_again()) / 32, blocks = plan.blocks_in * plan.blocks_out;
    share = warp / blocks;
    c_out = warp % blocks / plan.blocks_in * kChainBlock, c_in = warp % plan.blocks_in * kChainBlock;
  }
};

// A row of the tile is one step: 16 pixels.
template <class T>
__device__ __forceinline__ void add_to_dw_pw(ChainBlock& sum, const ChainBackwardPlan& plan,
                                             const FusedBackwardMemory& memory) {
  const WeightBlock block(plan);
  if (block.share >= plan.shares) return;
  const int lane = static_cast<int>(thread_index_again()) % 32;
  const int of_dr =
      (kHaloColumns + 1 + lane % 8 + lane / 16 * 8) * plan.pitch_out + (block.c_out + lane / 8 % 2 * 8) * 2;
  const int of_z = lane % 16 * plan.pitch_in + (block.c_in + lane / 16 * 8) * 2;
#pragma unroll 1
  for (int row = block.share; row < plan.tile_rows; row += plan.shares) {
    const unsigned char* dr = memory.dr.get() + of_dr + row * kHaloColumns * plan.pitch_out;
    uint32_t a[kBlockRows][4];
#pragma unroll
    for (int i = 0; i < kBlockRows; ++i) ldmatrix_x4_transposed(a[i], dr + i * 32);
    multiply_step<T>(sum, a, memory.z.get() + of_z + row * kChainTileColumns * plan.pitch_in);
  }
}

// Leaves the warp's block in its share's row of the partials.
__device__ __forceinline__ void store_dw_pw(const ChainBlock& sum, const FusedBackwardParams& p) {
  const WeightBlock block(p.plan);
  if (block.share >= p.plan.shares) return;
  const int lane = static_cast<int>(thread_index_again()) % 32;
  const int outputs = p.gradient.shape.c, inputs = p.depthwise.shape.c_in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.plan.shares + block.share;
  float* partial = p.dw_pw_partials + row * outputs * inputs;
#pragma unroll
  for (int i = 0; i < kBlockRows * 2; ++i) {
    const int c_out = block.c_out + i * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < kBlockColumns; ++j) {
      const int c_in = block.c_in + j * 8 + lane % 4 * 2;
      if (c_out >= outputs || c_in >= inputs) continue;
      const float pair[2] = {sum[i / 2][j][i % 2 * 2], sum[i / 2][j][i % 2 * 2 + 1]};
      Pack<float, 2>::round(pair).store(partial + c_out * inputs + c_in);
    }
  }
}

}  // namespace xsep::cuda
