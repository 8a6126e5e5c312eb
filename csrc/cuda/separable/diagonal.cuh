// z of a step in 16 bits, on tensor cores: for each tap, 8 channels of x times the diagonal matrix of their weights.
//
// Seven eighths of what the tensor core multiplies are zeros, and still an instruction of a warp has 128 multiply-adds
// that count, where one of each thread's own has 32 and wants x in float32 besides. A warp has 8 pixels across of up to
// 4 rows of one picture; a row of x, read by ldmatrix once for each column of taps, serves all the rows of y it is
// under.
//
// The zeros are not innocent where x is infinite or NaN: their product is NaN. So what came out as NaN is made again,
// value by value.
#pragma once

#include "tile.cuh"

namespace xsep::cuda {

template <class T, int K, int STRIDE, int CHUNK>
class DiagonalDepthwise {
  static constexpr int kUnits = CHUNK / 32;  // of 16 channels
  static constexpr int kAtOnce = STRIDE == 1 ? 2 : 1;
  static constexpr int kPixel = CHUNK + kFusedPixelMargin;
  static constexpr int kPairs = ((kFusedGroupRows - 1) * STRIDE + K + 1) / 2;  // of rows of x, which ldmatrix reads
  static constexpr int kColumn = detail::diagonal_taps(K), kChannel = K * kColumn;  // words of weights
  static constexpr int kFragments = kFusedGroupRows / 2 * kAtOnce * 2;
  static_assert(kFusedGroupRows == 4 && kFusedStripWidth == 8, "two matrices of 16 pixels");
  static_assert(kFusedZeroChannels == 4 * 8 && kAtOnce * 2 <= 4, "a lane beside the diagonal reads no further");

  const SeparableFpropParams& p_;
  const FusedMemory& memory_;
  const FusedStep& step_;
  const unsigned char* halo_;
  unsigned char* z_;

 public:
  __device__ __forceinline__ DiagonalDepthwise(const SeparableFpropParams& p, const FusedMemory& memory,
                                               const FusedStep& step, const unsigned char* halo, unsigned char* z)
      : p_(p), memory_(memory), step_(step), halo_(halo), z_(z) {}

  __device__ __forceinline__ void run() const {
    const SeparablePlan& plan = p_.plan;
    const int strips_across = (plan.tile_columns + kFusedStripWidth - 1) / kFusedStripWidth;
    const int items = memory_.tile[step_.map].groups * strips_across;
#pragma unroll 1
    for (int item = static_cast<int>(threadIdx.x) / 32; item < items; item += static_cast<int>(blockDim.x) / 32) {
      const int group = memory_.group[step_.map * plan.tile_rows + item / strips_across];
      make({group & 0xffff, group >> 16, item % strips_across * kFusedStripWidth});
    }
  }

 private:
  // What a warp makes z of at a time.
  struct Item {
    int first_row, rows;  // in the tile
    int column;           // the first
  };
  // [2 (of 16 pixels), kAtOnce units, 2 (of 8 channels)] fragments of mma
  using Sums = float[kFragments][4];
  static __device__ __forceinline__ constexpr int fragment(int matrix, int unit, int half) {
    return (matrix * kAtOnce + unit) * 2 + half;
  }

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // Of the item's first tap, in the halo.
  __device__ __forceinline__ int first_pixel(const Item& item) const {
    const SeparablePlan& plan = p_.plan;
    return memory_.slot[step_.map * plan.tile_rows + item.first_row] * plan.halo_pitch + item.column * STRIDE;
  }

  __device__ __forceinline__ void make(const Item& item) const {
    const SeparablePlan& plan = p_.plan;
    // ldmatrix reads two rows of x, of each 8 pixels and both halves of a unit. Rows of which no tap is wanted are the
    // last one that is.
    const unsigned char* const corner =
        halo_ + (first_pixel(item) + lane() % 8 * STRIDE) * kPixel + lane() / 8 % 2 * 16;
    const int last = (item.rows - 1) * STRIDE + K - 1, row_bytes = plan.halo_pitch * kPixel;
    const unsigned char* source[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) source[i] = corner + min(2 * i + lane() / 16, last) * row_bytes;
    // A lane has two rows, 2 (lane % 4) and the next, of column lane / 4 of the diagonal matrix.
    const bool on_diagonal = lane() / 8 == lane() % 4;
    const int first = on_diagonal ? step_.chunk * kUnits * 16 + lane() / 4 : plan.table_channels;
    const uint32_t* weights = memory_.taps.get() + first * kChannel;
    int places[kFusedGroupRows];
    find_places(places, item);
#pragma unroll 1
    for (int unit = 0; unit < kUnits; unit += kAtOnce) {
      Sums sums = {};
      multiply(sums, source, weights);
      weights += on_diagonal ? kAtOnce * 16 * kChannel : 0;
#pragma unroll
      for (const unsigned char*& row : source) row += kAtOnce * 32;
      if (p_.has_middle != 0) apply_middle(sums, unit);
      store(sums, item, places, unit);
    }
  }

  __device__ __forceinline__ void multiply(Sums& sums, const unsigned char* const (&source)[kPairs],
                                           const uint32_t* weights) const {
#pragma unroll
    for (int s = 0; s < K; ++s) {
      Pack<uint32_t, 4> taps[kAtOnce * 2][kColumn / 4];  // of 8 channels each
#pragma unroll
      for (int i = 0; i < kAtOnce * 2; ++i) {
#pragma unroll
        for (int j = 0; j < kColumn / 4; ++j) {
          taps[i][j] = Pack<uint32_t, 4>::load(weights + i * 8 * kChannel + s * kColumn + j * 4);
        }
      }
#pragma unroll
      for (int unit = 0; unit < kAtOnce; ++unit) {
        uint32_t x[kPairs][4];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) ldmatrix_x4(x[i], source[i] + s * kPixel + unit * 32);
#pragma unroll
        for (int r = 0; r < K; ++r) {
#pragma unroll
          for (int matrix = 0; matrix < 2; ++matrix) {
            const int above = 2 * matrix * STRIDE + r, below = above + STRIDE;  // rows of x
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              mma_m16n8k8(sums[fragment(matrix, unit, half)], x[above / 2][above % 2 * 2 + half],
                          x[below / 2][below % 2 * 2 + half], taps[unit * 2 + half][r / 4].v[r % 4], T());
            }
          }
        }
      }
    }
  }

  // Of a lane's two channels in 8.
  __device__ __forceinline__ int channel_of(int unit, int half) const {
    return (step_.chunk * kUnits + unit) * 16 + half * 8 + lane() % 4 * 2;
  }

  // half: of the first group, where there is but one.
  template <int GROUPS>
  __device__ __forceinline__ void apply_middle(float (&u)[GROUPS][4], int unit, int half = 0) const {
    const float* vectors = memory_.vectors.get() + 2 * p_.plan.table_channels;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int channel = channel_of(unit + g / 2 % kAtOnce, half + g % 2);
      const auto scale = Pack<float, 2>::load(vectors + channel);
      const auto shift = Pack<float, 2>::load(vectors + p_.plan.table_channels + channel);
#pragma unroll
      for (int i = 0; i < 4; ++i) u[g][i] = fmaf(scale.v[i % 2], u[g][i], shift.v[i % 2]);
    }
    activate_groups(u, {p_.middle.activation, p_.middle.alpha});
  }

  static __device__ __forceinline__ bool is_nan(uint32_t pair) {
    constexpr uint32_t kInfinity = std::is_same<T, __half>::value ? 0x7c00u : 0x7f80u;
    return (pair & 0x7fffu) > kInfinity || (pair >> 16 & 0x7fffu) > kInfinity;
  }

  __device__ __forceinline__ void store(const Sums& sums, const Item& item, const int (&places)[kFusedGroupRows],
                                        int unit) const {
    uint32_t rounded[kFragments][2];
    uint32_t largest = 0;
#pragma unroll
    for (int g = 0; g < kFragments; ++g) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rounded[g][i] = round_pair(sums[g][2 * i], sums[g][2 * i + 1], T());
        largest = max_nan_pairs(largest, rounded[g][i], T());
      }
    }
    if (__any_sync(0xffffffffu, is_nan(largest))) {
      make_again(item, places, unit);
      return;
    }
#pragma unroll
    for (int row = 0; row < kFusedGroupRows; ++row) {
#pragma unroll
      for (int i = 0; i < kAtOnce * 2; ++i) {
        store(places[row], unit * 2 + i, rounded[row / 2 * kAtOnce * 2 + i][row % 2]);
      }
    }
  }

  // The same values one by one.
  __device__ __forceinline__ void make_again(const Item& item, const int (&places)[kFusedGroupRows], int unit) const {
    const int row_bytes = p_.plan.halo_pitch * kPixel;
    const unsigned char* const corner =
        halo_ + (first_pixel(item) + lane() / 4 * STRIDE) * kPixel + unit * 32 + lane() % 4 * 4;
#pragma unroll 1
    for (int i = 0; i < kFusedGroupRows * kAtOnce * 2; ++i) {
      const int row = i / (kAtOnce * 2), eight = i % (kAtOnce * 2);
      const uint32_t* weights = memory_.taps.get() + channel_of(unit + eight / 2, eight % 2) * kChannel;
      float u[1][4] = {};
#pragma unroll 1
      for (int tap = 0; row < item.rows && tap < K * K; ++tap) {
        const int r = tap / K, s = tap % K;
        float x[2], weight[2];
        widen_pair(x, load(corner + (row * STRIDE + r) * row_bytes + s * kPixel + eight * 16), T());
        // One lies in the lower half of its word, the other in the upper.
        widen_pair(weight, weights[s * kColumn + r] | weights[kChannel + s * kColumn + r], T());
#pragma unroll
        for (int v = 0; v < 2; ++v) u[0][v] = fmaf(x[v], weight[v], u[0][v]);
      }
      if (p_.has_middle != 0) apply_middle(u, unit + eight / 2, eight % 2);
      const uint32_t pair = round_pair(u[0][0], u[0][1], T());
#pragma unroll
      for (int k = 0; k < kFusedGroupRows; ++k) {
        if (k == row) store(places[k], unit * 2 + eight, pair);
      }
    }
  }

  static __device__ __forceinline__ uint32_t load(const unsigned char* place) {
    return *reinterpret_cast<const uint32_t*>(place);
  }

  // Where in shared memory this lane's first two channels of its pixels are in z, each in a row of the item; -1 where
  // that is none of the tile's. The places of other channels differ in single bits: z begins at a multiple of 128
  // bytes.
  __device__ __forceinline__ void find_places(int (&places)[kFusedGroupRows], const Item& item) const {
    static_assert(kSharedAlignment % 128 == 0, "as do all buffers");
    const int columns = p_.plan.tile_columns, column = item.column + lane() / 4;
#pragma unroll
    for (int row = 0; row < kFusedGroupRows; ++row) {
      const int at = static_cast<int>(z_ - shared_base()) + lane() % 4 * 4;
      const bool exists = row < item.rows && column < columns;
      places[row] = exists ? at + swizzled_offset((item.first_row + row) * columns + column, 0, CHUNK) : -1;
    }
  }

  static __device__ __forceinline__ void store(int place, int eight, uint32_t pair) {
    if (place >= 0) *reinterpret_cast<uint32_t*>(shared_base() + (place ^ eight << 4)) = pair;
  }
};

}  // namespace xsep::cuda
