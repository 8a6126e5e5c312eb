// Sums over the pixels of a unit of the depthwise backward, and those of all units added up.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/geometry.h"
#include "vec.h"

namespace xsep::cpu {
namespace detail {

/// Sums over pixels: in float32 for as long as that loses little, then in double.
class UnitSums {
 public:
  /// count rows of channels [begin, end); to [count, c_pad] is where they end up, or null for no sums.
  UnitSums(double* to, int64_t count, int64_t c_pad, Range channels)
      : to_(to),
        count_(to ? count : 0),
        c_pad_(c_pad),
        channels_(channels),
        stride_(table_row(channels.end - channels.begin)),
        short_(static_cast<size_t>(count_ * stride_), 0.0f) {
    for (int64_t i = 0; i < count_; ++i) std::fill(row(i) + channels.begin, row(i) + channels.end, 0.0);
  }
  int64_t stride() const { return stride_; }
  /// Such that channel c of row i is at [i * stride() + c].
  float* channel_zero() { return to_ ? short_.data() - channels_.begin : nullptr; }
  void flush() {
    for (int64_t i = 0; i < count_; ++i) {
      double* sum = row(i) + channels_.begin;
      float* part = short_.data() + i * stride_;
      for (int64_t c = 0; c < channels_.end - channels_.begin; ++c) sum[c] += part[c];
      std::fill(part, part + stride_, 0.0f);
    }
  }

 private:
  double* row(int64_t i) { return to_ + i * c_pad_; }

  double* to_;
  int64_t count_, c_pad_;
  Range channels_;
  int64_t stride_;
  std::vector<float> short_;  // [count, stride]
};

/// Pixels whose products are summed in float32: an error of some units in the last place of a sum of 64.
constexpr int64_t kPixelsPerFlush = 64;

}  // namespace detail

/// sums [count, c_pad] = the partial sums [groups, count, c_pad] of all row groups for channels [begin, end), added in
/// the order of the groups.
inline void reduce_partials(const double* partials, int64_t groups, int64_t count, int64_t c_pad, Range channels,
                            double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    double* sum = sums + i * c_pad;
    std::fill(sum + channels.begin, sum + channels.end, 0.0);
    for (int64_t group = 0; group < groups; ++group) {
      const double* part = partials + (group * count + i) * c_pad;
      for (int64_t c = channels.begin; c < channels.end; ++c) sum[c] += part[c];
    }
  }
}

}  // namespace xsep::cpu
