// z of a step in 16 bits, on tensor cores: for each tap, 8 channels of x times the diagonal matrix of their weights.
//
// Seven eighths of what the tensor core multiplies are zeros, and still an instruction of a warp has 128 multiply-adds
// that count, where one of each thread's own has 32 and wants x in float32 besides. A warp makes two blocks at a time,
// each 8 pixels across and up to 4 rows of one picture down, wherever in the tile they lie: they are the upper and the
// lower half of mma's 16 rows. A row of x, read by ldmatrix once for each column of taps, serves all the rows of z that
// it is under, and both its halves are registers as mma wants them.
//
// The zeros are not innocent where x is infinite or NaN: their product is NaN. So what came out as NaN is made again,
// value by value.
#pragma once

#include "tile.cuh"

namespace xsep::cuda {

// EDGES: of a tile at the right edge, pixels past the picture are left out of z too.
template <class T, int K, int STRIDE, int CHUNK, bool EDGES = false>
class DiagonalDepthwise {
  static constexpr int kEights = CHUNK / 16;  // of channels
  static constexpr int kPixel = CHUNK + kFusedPixelMargin;
  static constexpr int kPairs = ((kFusedGroupRows - 1) * STRIDE + K + 1) / 2;       // of rows of x under a block
  static constexpr int kColumn = detail::diagonal_taps(K), kChannel = K * kColumn;  // words of weights
  static_assert(kFusedStripWidth == 8, "a block is half of a matrix's rows");
  static_assert(kFusedZeroChannels >= 16, "a lane beside the diagonal reads no further");

  const SeparableFpropParams& p_;
  const FusedMemory& memory_;
  const FusedStep& step_;
  const unsigned char* halo_;
  const unsigned char* z_;

 public:
  __device__ __forceinline__ DiagonalDepthwise(const SeparableFpropParams& p, const FusedMemory& memory,
                                               const FusedStep& step, const unsigned char* halo, const unsigned char* z)
      : p_(p), memory_(memory), step_(step), halo_(halo), z_(z) {}

  // The eights of channels of all pairs of blocks, shared out among the warps in runs, so that a warp seldom changes
  // its pair.
  __device__ __forceinline__ void run() const {
    const FusedTile& tile = memory_.tile[step_.map];
    const int warp = static_cast<int>(threadIdx.x) / 32, end = min((warp + 1) * tile.share, tile.pairs * kEights);
#pragma unroll 1
    for (int i = warp * tile.share; i < end;) {
      const int pair = i / kEights, stop = min((pair + 1) * kEights, end);
      make(pair, i % kEights, i % kEights + stop - i);
      i = stop;
    }
  }

 private:
  using Sums = float[kFusedGroupRows][4];  // a row of both blocks is a fragment of mma

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  __device__ __forceinline__ FusedBlock block_of(int number) const {
    return FusedBlock::unpacked(memory_.block[step_.map * detail::blocks_of(p_.plan) + number]);
  }

  // Where in shared memory a pixel of x under a block is: `across` from the block's first, in its first row.
  __device__ __forceinline__ int place_of(const FusedBlock& block, int across) const {
    return shared_place(halo_) + (block.halo_pixel + across * STRIDE) * kPixel;
  }

  // Some eights of channels of two blocks.
  __device__ __forceinline__ void make(int pair, int eight, int stop) const {
    const int row_bytes = p_.plan.halo_pitch * kPixel;
    // ldmatrix reads two rows: lanes 0 to 7 have the first block's pixels, the next 8 the other's, and so on. Rows of
    // which no tap is wanted are the last one that is.
    const FusedBlock read = block_of(2 * pair + lane() / 8 % 2);
    static_assert(K > STRIDE, "a block of no rows has rows of x");
    const int corner = place_of(read, lane() % 8) + eight * 16, last = (read.rows - 1) * STRIDE + K - 1;
    int source[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) source[i] = corner + min(2 * i + lane() / 16, last) * row_bytes;
    // A lane has two rows, 2 (lane % 4) and the next, of column lane / 4 of the diagonal matrix.
    const bool on_diagonal = lane() / 8 == lane() % 4;
    const int channel = on_diagonal ? (step_.chunk * kEights + eight) * 8 + lane() / 4 : p_.plan.table_channels;
    const uint32_t* weights = memory_.taps.get() + channel * kChannel;
    int places[2][kFusedGroupRows];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const FusedBlock written = block_of(2 * pair + block);
#pragma unroll
      for (int row = 0; row < kFusedGroupRows; ++row) places[block][row] = place_in_z(written, row);
    }
#pragma unroll 1
    for (; eight < stop; ++eight) {
      Sums sums = {};
      multiply(sums, source, weights);
      if (p_.has_middle != 0) apply_middle(sums, eight);
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < 2 * kFusedGroupRows; ++i) {
        const int row = i / 2, block = i % 2;
        const uint32_t values = round_pair(sums[row][2 * block], sums[row][2 * block + 1], T());
        largest = max_nan_pairs(largest, values, T());
        store(places[block][row], eight, values);
      }
      if (__any_sync(0xffffffffu, is_nan(largest))) make_again(pair, eight);
      __syncwarp();  // ldmatrix wants all lanes, and they may have gone several ways
      weights += on_diagonal ? 8 * kChannel : 0;
#pragma unroll
      for (int& row : source) row += 16;
    }
  }

  __device__ __forceinline__ void multiply(Sums& sums, const int (&source)[kPairs], const uint32_t* weights) const {
    uint32_t x[2][4];  // the rows that are multiplied, and the next
    ldmatrix_x4(x[0], shared_base() + source[0]);
#pragma unroll
    for (int s = 0; s < K; ++s) {
      Pack<uint32_t, 4> taps[kColumn / 4];
#pragma unroll
      for (int i = 0; i < kColumn / 4; ++i) taps[i] = Pack<uint32_t, 4>::load(weights + s * kColumn + i * 4);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int turn = s * kPairs + pair, next = turn + 1;
        if (next < K * kPairs) {
          ldmatrix_x4(x[next % 2], shared_base() + source[next % kPairs] + next / kPairs * kPixel);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int out = 0; out < kFusedGroupRows; ++out) {
            const int r = 2 * pair + i - out * STRIDE;
            if (r < 0 || r >= K) continue;
            mma_m16n8k8(sums[out], x[turn % 2][2 * i], x[turn % 2][2 * i + 1], taps[r / 4].v[r % 4], T());
          }
        }
      }
    }
  }

  // The first of a lane's two channels in 8.
  __device__ __forceinline__ int channel_of(int eight) const {
    return (step_.chunk * kEights + eight) * 8 + lane() % 4 * 2;
  }

  template <int ROWS>
  __device__ __forceinline__ void apply_middle(float (&u)[ROWS][4], int eight) const {
    const float* vectors = memory_.vectors.get() + 2 * p_.plan.table_channels + channel_of(eight);
    const auto scale = Pack<float, 2>::load(vectors);
    const auto shift = Pack<float, 2>::load(vectors + p_.plan.table_channels);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) u[row][i] = fmaf(scale.v[i % 2], u[row][i], shift.v[i % 2]);
    }
    activate_groups(u, {p_.middle.activation, p_.middle.alpha});
  }

  static __device__ __forceinline__ bool is_nan(uint32_t pair) {
    constexpr uint32_t kInfinity = std::is_same<T, __half>::value ? 0x7c00u : 0x7f80u;
    return (pair & 0x7fffu) > kInfinity || (pair >> 16 & 0x7fffu) > kInfinity;
  }

  // Where in shared memory this lane's first two channels of its pixel in a row of the block are in z; negative where
  // that is none of the tile's. The places of other channels differ in single bits: z begins at a multiple of 128
  // bytes.
  __device__ __forceinline__ int place_in_z(const FusedBlock& block, int row) const {
    static_assert(kSharedAlignment % 128 == 0, "as do all buffers");
    const int pixel = (block.strip + row * p_.plan.strips) * kFusedStripWidth + lane() / 4;
    if (row >= block.rows) return kNowhere;
    if (EDGES) {
      const int strip = block.strip - p_.plan.by_strips.quotient(block.strip) * p_.plan.strips;
      if (strip * kFusedStripWidth + lane() / 4 >= memory_.tile[step_.map].columns) return kNowhere;
    }
    return shared_place(z_) + lane() % 4 * 4 + memory_.z_place[pixel];
  }

  static __device__ __forceinline__ void store(int place, int eight, uint32_t pair) {
    if (place >= 0) *reinterpret_cast<uint32_t*>(shared_base() + (place ^ eight << 4)) = pair;
  }

  // The same values one by one.
  __device__ __forceinline__ void make_again(int pair, int eight) const {
    const int row_bytes = p_.plan.halo_pitch * kPixel;
#pragma unroll 1
    for (int i = 0; i < 2 * kFusedGroupRows; ++i) {
      const int row = i / 2;
      const FusedBlock block = block_of(2 * pair + i % 2);
      const int place = place_in_z(block, row);
      if (place < 0) continue;
      const unsigned char* corner =
          shared_base() + place_of(block, lane() / 4) + row * STRIDE * row_bytes + eight * 16 + lane() % 4 * 4;
      const uint32_t* weights = memory_.taps.get() + channel_of(eight) * kChannel;
      float u[1][4] = {};
#pragma unroll 1
      for (int tap = 0; tap < K * K; ++tap) {
        const int r = tap / K, s = tap % K;
        float x[2], weight[2];
        widen_pair(x, *reinterpret_cast<const uint32_t*>(corner + r * row_bytes + s * kPixel), T());
        // One lies in the lower half of its word, the other in the upper.
        widen_pair(weight, weights[s * kColumn + r] | weights[kChannel + s * kColumn + r], T());
#pragma unroll
        for (int v = 0; v < 2; ++v) u[0][v] = fmaf(x[v], weight[v], u[0][v]);
      }
      if (p_.has_middle != 0) apply_middle(u, eight);
      store(place, eight, round_pair(u[0][0], u[0][1], T()));
    }
  }
};

}  // namespace xsep::cuda
