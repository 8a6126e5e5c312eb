// Depthwise forward in BFloat16 by AVX512_BF16's dot product of pairs: two rows of the filter at once, where a
// multiplication in float would convert each value first and take a row each.
#pragma once

#include "vec.h"

namespace xsep::cpu {

/// Channels of one step: a vector of BFloat16.
constexpr int64_t kPairChannels = 32;

/// How many of so many channels, from the first on, are multiplied in pairs: all, but for a last single vector of
/// floats, which would fill half a step.
constexpr int64_t paired_channels(int64_t channels) {
  const int64_t rest = channels % kPairChannels;
  return rest <= kPairChannels / 2 ? channels - rest : channels;
}

/// Weights as pairs, in the order in which two rows of pixels are interleaved: [2, R, S, table_row(c_pairs)], c_pairs
/// whole steps of channels. [0, r] pairs row r with row r + 1, [1, r] with nothing.
inline int64_t pair_weights_size(int64_t r, int64_t s, int64_t c_pairs) { return 2 * r * s * table_row(c_pairs); }

#if defined(__AVX512BW__)
/// From w [R * S, c_pad] of values that are BFloat16: their low halves are zero.
inline void pack_pair_weights(const float* w, int64_t r, int64_t s, int64_t c_pad, int64_t c_pairs, uint32_t* out) {
  // Interleaving works on quarters of a vector: the first half of each eight channels, then the second half.
  const auto store_pairs = [](VecBits first, VecBits second, uint32_t* to) {
    const auto a = reinterpret_cast<__m512i>(first);
    const auto b = reinterpret_cast<__m512i>(second);
    _mm512_storeu_si512(to, _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0x88));
    _mm512_storeu_si512(to + kLanes, _mm512_maskz_shuffle_i32x4(0xffff, a, b, 0xdd));
  };
  const int64_t row = table_row(c_pairs);
  for (int64_t tap = 0; tap < r * s; ++tap) {
    const float* above = w + tap * c_pad;
    const float* below = tap < (r - 1) * s ? above + s * c_pad : nullptr;
    uint32_t* paired = out + tap * row;
    uint32_t* alone = paired + r * s * row;
    for (int64_t c = 0; c < c_pairs; c += kPairChannels) {
      const VecBits low[2] = {as_bits(load(above + c)) >> 16, as_bits(load(above + c + kLanes)) >> 16};
      store_pairs(low[0], low[1], alone + c);
      if (below) {
        store_pairs(low[0] | as_bits(load(below + c)), low[1] | as_bits(load(below + c + kLanes)), paired + c);
      } else {
        store_pairs(low[0], low[1], paired + c);
      }
    }
  }
}

namespace detail {

/// Values of 32 channels of two pixels, interleaved.
struct PairVectors {
  VecBits low, high;
};

/// Rows below each other, where kSome of the channels of the mask; below null: zeros.
template <bool kSome>
XSEP_INLINE PairVectors load_pairs(__mmask32 channels, const BFloat16* above, const BFloat16* below) {
  const auto load = [&](const BFloat16* p) __attribute__((always_inline)) {
    return kSome ? _mm512_maskz_loadu_epi16(channels, p) : _mm512_loadu_si512(p);
  };
  const __m512i a = load(above);
  const __m512i b = below ? load(below) : _mm512_setzero_si512();
  return {reinterpret_cast<VecBits>(_mm512_unpacklo_epi16(a, b)),
          reinterpret_cast<VecBits>(_mm512_unpackhi_epi16(a, b))};
}

/// Sums of interleaved channels back in order: [0, 16) and [16, 32).
XSEP_INLINE void in_channel_order(Vec& low, Vec& high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 l = reinterpret_cast<__m512>(low);
  const __m512 h = reinterpret_cast<__m512>(high);
  low = reinterpret_cast<Vec>(_mm512_permutex2var_ps(l, first, h));
  high = reinterpret_cast<Vec>(_mm512_permutex2var_ps(l, second, h));
}

/// Sums of kPixels outputs over rows [r_begin, r_end) of the filter, for so many channels, all 32 but where kEdges, of
/// x's rows from `offset` and of w on. There, columns outside [first, last) are no part of the picture.
template <int kS, int kStride, int kPixels, bool kEdges>
XSEP_INLINE void sum_pairs(const BFloat16* const* x, int64_t offset, int64_t column_step, int64_t first, int64_t last,
                           const uint32_t* w, int64_t rows, int64_t w_row, int64_t r_begin, int64_t r_end,
                           int64_t channels, Vec (&low)[kPixels], Vec (&high)[kPixels]) {
  typedef VecBits BitsUnaligned __attribute__((aligned(4), may_alias));
  constexpr int kColumns = (kPixels - 1) * kStride + kS;
  const auto mask = static_cast<__mmask32>(~uint32_t{0} >> (kPairChannels - channels));
  const auto add_rows = [&](const BFloat16* above, const BFloat16* below, int64_t r) __attribute__((always_inline)) {
    const bool two = below != nullptr;
    const uint32_t* tap = w + ((two ? 0 : rows) + r) * kS * w_row;
    VecBits w_low[kS], w_high[kS];
    XSEP_UNROLL
    for (int s = 0; s < kS; ++s, tap += w_row) {
      w_low[s] = *reinterpret_cast<const BitsUnaligned*>(tap);
      w_high[s] = *reinterpret_cast<const BitsUnaligned*>(tap + kLanes);
    }
    XSEP_UNROLL
    for (int j = 0; j < kColumns; ++j, above += column_step, below += two ? column_step : 0) {
      if (kEdges && (j < first || j >= last)) continue;
      const PairVectors v = load_pairs<kEdges>(mask, above, below);
      XSEP_UNROLL
      for (int i = 0; i < kPixels; ++i) {
        const int s = j - i * kStride;
        if (s >= 0 && s < kS) {
          low[i] = dot_pairs(low[i], v.low, w_low[s]);
          high[i] = dot_pairs(high[i], v.high, w_high[s]);
        }
      }
    }
  };
  int64_t r = r_begin;
  for (; r + 1 < r_end; r += 2, x += 2) add_rows(x[0] + offset, x[1] + offset, r);
  if (r < r_end) add_rows(x[0] + offset, nullptr, r);
}

}  // namespace detail
#endif

}  // namespace xsep::cpu
