// One warp's block of the product: kWarpPixels x kWarpChannels float32 accumulators in the fragment layout of mma.
#pragma once

#include "tile.cuh"

namespace xsep::cuda {

inline constexpr int kMmaRows = kWarpPixels / 16;
inline constexpr int kMmaColumns = kWarpChannels / 8;

// [8 i + j][e]: pixel 16 i + lane / 4 + 8 (e / 2), column 8 j + 2 (lane % 4) + e % 2 of the warp's block.
using Accumulators = float[kMmaRows * kMmaColumns][4];
static_assert(kMmaRows == 4 && kMmaColumns == 8, "128 accumulators of the 255 registers a thread has");

// Which output channel a column is. Within 32 of them they are so ordered that the 8 columns which a thread has in four
// fragments are neighbouring channels, that is 16 bytes of y. w_pw lies in shared memory in the order of the columns.
inline constexpr int kRunsBlock = 32;
__device__ __forceinline__ int channel_of_column(int column) {
  return column / kRunsBlock * kRunsBlock + column % 8 / 2 * 8 + column % kRunsBlock / 8 * 2 + column % 2;
}

// Where a warp's block lies in the tile. Found again each time rather than kept, as registers are scarce.
struct WarpBlock {
  int pixel, channel;
  bool exists;  // not where there are fewer pixels than warps for them
  bool wide;    // whether there are output channels in its upper half

  __device__ __forceinline__ explicit WarpBlock(const SeparableFpropParams& p) {
    const int warp = static_cast<int>(thread_index_again()) / 32;
    pixel = (warp & (p.plan.row_warps - 1)) * kWarpPixels, channel = (warp >> p.plan.row_warps_log2) * kWarpChannels;
    exists = pixel < p.plan.z_rows;
    wide = p.c_out - channel > kRunsBlock;
  }
};

// A type policy: what is stored, what z is rounded to, and how 32 bytes of the chunk are multiplied.
template <class Type>
struct TensorCores16 {
  using T = Type;
  static constexpr bool kSimt = false;
  static __device__ __forceinline__ void prepare(uint32_t (&)[4]) {}
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16(d, a, b, Type());
  }
};

struct TensorCoresTf32 {
  using T = float;
  static constexpr bool kSimt = false;
  static __device__ __forceinline__ void prepare(uint32_t (&fragment)[4]) {
#pragma unroll
    for (uint32_t& bits : fragment) bits = to_tf32(__uint_as_float(bits));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

struct Simt32 {
  using T = float;
  static constexpr bool kSimt = true;
};

// accumulators += z w_pw^T over one chunk; a step is 32 bytes, 16 or 8 elements of K. The rows that one lane reads are
// multiples of 8 apart, so they share their permutation: one address serves them all. That of another unit differs in
// single bits, as buffers begin at multiples of 128 bytes.
template <class Policy, int CHUNK>
__device__ __forceinline__ void multiply_chunk(Accumulators& accumulators, const unsigned char* z,
                                               const unsigned char* w_pw, const WarpBlock& block) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kEightRows = 8 * CHUNK;
  if constexpr (Policy::kSimt) {
    const auto load = [](const unsigned char* p) { return Pack<float, 2>::load(reinterpret_cast<const float*>(p)); };
    const int row = block.pixel + lane / 4, column = block.channel + lane % 4 * 2;
#pragma unroll 1
    for (int half = 0; half < CHUNK / 8; ++half) {
      const int unit = half / 2, within = half % 2 * 8;
      Pack<float, 2> a[kMmaRows * 2];
      const unsigned char* source = z + swizzled_offset(row, unit, CHUNK) + within;
#pragma unroll
      for (int i = 0; i < kMmaRows * 2; ++i) a[i] = load(source + i * kEightRows);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        source = w_pw + swizzled_offset(column + e, unit, CHUNK) + within;
#pragma unroll
        for (int j = 0; j < kMmaColumns; ++j) {
          if (j == kMmaColumns / 2 && !block.wide) break;
          const auto b = load(source + j * kEightRows);
#pragma unroll
          for (int i = 0; i < kMmaRows * 2; ++i) {
            float& sum = accumulators[i / 2 * kMmaColumns + j][i % 2 * 2 + e];
#pragma unroll
            for (int k = 0; k < 2; ++k) sum = fmaf(a[i].v[k], b.v[k], sum);
          }
        }
      }
    }
  } else {
    const int row = block.pixel + lane % 16, column = block.channel + lane % 8 + lane / 16 * 8;
    const int of_z = shared_place(z) + swizzled_offset(row, lane / 16, CHUNK);
    const int of_w_pw = shared_place(w_pw) + swizzled_offset(column, lane / 8 % 2, CHUNK);
#pragma unroll 1
    for (int unit = 0; unit < CHUNK / 16; unit += 2) {
      uint32_t a[kMmaRows][4];
      const unsigned char* source = shared_base() + (of_z ^ unit << 4);
#pragma unroll
      for (int i = 0; i < kMmaRows; ++i) {
        ldmatrix_x4(a[i], source + 2 * i * kEightRows);
        Policy::prepare(a[i]);
      }
      source = shared_base() + (of_w_pw ^ unit << 4);
#pragma unroll
      for (int j = 0; j < kMmaColumns; j += 2) {
        if (j == kMmaColumns / 2 && !block.wide) break;
        uint32_t b[4];
        ldmatrix_x4(b, source + j * kEightRows);
        Policy::prepare(b);
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kMmaRows; ++i) {
          Policy::mma(accumulators[i * kMmaColumns + j], a[i], left);
          Policy::mma(accumulators[i * kMmaColumns + j + 1], a[i], right);
        }
      }
    }
  }
}

}  // namespace xsep::cuda
