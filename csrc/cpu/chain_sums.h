// Sums over pixels that the training chain's BatchNorms need: of a raw output tile by tile, and of a gradient. What is
// multiplied is centred before it is added up, so that nothing cancels.
#pragma once

#include "../common/geometry.h"
#include "channels.h"

namespace xsep::cpu {

/// Of r T [pixels, c] to [3, c]: the mean K as float32 has it, the sums of r - K and of its square.
template <class T>
void tile_statistics(const T* r, int64_t pixels, int64_t channels, float* to) {
  const float share = 1.0f / static_cast<float>(pixels);
  by_vectors(channels, [&](int64_t c, auto count, int lanes) __attribute__((always_inline)) {
    constexpr int kVectors = count();
    Vec mean[kVectors];
    set_zero(mean);
    Vec sum[kVectors];
    set_zero(sum);
    Vec square[kVectors];
    set_zero(square);
    const T* at = r + c;
    for (int64_t i = 0; i < pixels; ++i, at += channels) {
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) mean[j] = mean[j] + load_lanes(at + j * kLanes, lanes);
    }
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) mean[j] = mean[j] * share;
    at = r + c;
    for (int64_t i = 0; i < pixels; ++i, at += channels) {
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const Vec off = load_lanes(at + j * kLanes, lanes) - mean[j];
        sum[j] = sum[j] + off;
        square[j] = fma(off, off, square[j]);
      }
    }
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      float* out = to + c + j * kLanes;
      store_lanes(out, mean[j], lanes);
      store_lanes(out + channels, sum[j], lanes);
      store_lanes(out + 2 * channels, square[j], lanes);
    }
  });
}

/// What a gradient is summed with.
struct GradientSums {
  int64_t channels;
  int64_t operands;
  const void* const* operand;  // [operands] of T [pixels, c]
  const float* centres;        // [1 + operands, c], its first row unused
  int64_t rows() const { return 1 + operands; }
};

namespace detail {

/// sums[c] += the sum of g, or of g * (operand - centre), T [pixels, c].
template <class T, bool kProduct>
void add_pixels(const T* g, const T* operand, const float* centre, int64_t pixels, int64_t channels, double* sums) {
  by_vectors(channels, [&](int64_t c, auto count, int lanes) __attribute__((always_inline)) {
    constexpr int kVectors = count();
    Vec sum[kVectors];
    set_zero(sum);
    Vec off[kVectors];
    set_zero(off);
    if constexpr (kProduct) {
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) off[j] = load_lanes(centre + c + j * kLanes, lanes);
    }
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t at = i * channels + c;
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const Vec v = load_lanes(g + at + j * kLanes, lanes);
        if constexpr (kProduct) {
          sum[j] = fma(load_lanes(operand + at + j * kLanes, lanes) - off[j], v, sum[j]);
        } else {
          sum[j] = sum[j] + v;
        }
      }
    }
    float lane_sums[kVectors * kLanes];
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) store(lane_sums + j * kLanes, sum[j]);
    const int some = kVectors > 1 ? kVectors * kLanes : lanes;
    for (int i = 0; i < some; ++i) sums[c + i] += lane_sums[i];
  });
}

}  // namespace detail

/// Pixels whose products are summed in float32, then in double.
constexpr int64_t kGradientRun = 64;

/// sums [1 + operands, c] += those of g T [pixels, c], at most kGradientRun of them; `first` is the first pixel's
/// place in the operands.
template <class T>
void add_gradient_sums(const GradientSums& p, const T* g, int64_t first, int64_t pixels, double* sums) {
  detail::add_pixels<T, false>(g, nullptr, nullptr, pixels, p.channels, sums);
  for (int64_t k = 0; k < p.operands; ++k) {
    const T* operand = static_cast<const T*>(p.operand[k]) + first * p.channels;
    const int64_t row = (1 + k) * p.channels;
    detail::add_pixels<T, true>(g, operand, p.centres + row, pixels, p.channels, sums + row);
  }
}

}  // namespace xsep::cpu
