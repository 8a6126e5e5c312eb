// Sizes and spatial geometry of a depthwise convolution, for host and device.
//
// N C H W input, P Q output height and width, R S filter height and width.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define XSEP_HOST_DEVICE __host__ __device__
#else
#define XSEP_HOST_DEVICE
#endif

namespace xsep {

/// A half-open range of indices; empty where end <= begin.
struct Range {
  int64_t begin;
  int64_t end;
};

/// ceil(a / b) and floor(a / b) for b > 0 and any a.
XSEP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
XSEP_HOST_DEVICE constexpr int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
XSEP_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static_assert(ceil_div(-3, 2) == -1 && ceil_div(3, 2) == 2 && floor_div(-3, 2) == -2 && floor_div(3, 2) == 1);

/// In the order of the ops' `int[8] geometry` argument.
struct Geometry {
  int64_t stride_h, stride_w;
  int64_t pad_left, pad_right, pad_top, pad_bottom;
  int64_t dilation_h, dilation_w;
};

/// One depthwise convolution: [n, c, h, w] -> [n, c * multiplier, p, q] with an r by s filter.
struct DepthwiseShape {
  int64_t n, c, h, w;
  int64_t p, q;
  int64_t r, s;
  int64_t multiplier;
  Geometry geometry;

  XSEP_HOST_DEVICE int64_t pixels_in() const { return n * h * w; }
  XSEP_HOST_DEVICE int64_t pixels_out() const { return n * p * q; }
  XSEP_HOST_DEVICE int64_t taps() const { return r * s; }

  /// p and q from the rest; not positive where the filter does not fit.
  XSEP_HOST_DEVICE void set_output_size() {
    const Geometry& g = geometry;
    p = floor_div(h + g.pad_top + g.pad_bottom - g.dilation_h * (r - 1) - 1, g.stride_h) + 1;
    q = floor_div(w + g.pad_left + g.pad_right - g.dilation_w * (s - 1) - 1, g.stride_w) + 1;
  }
};

/// Taps t in [0, taps) whose position origin + t * dilation lies in [0, extent).
XSEP_HOST_DEVICE constexpr Range taps_inside(int64_t origin, int64_t extent, int64_t taps, int64_t dilation) {
  const int64_t first = origin >= 0 ? 0 : ceil_div(-origin, dilation);
  const int64_t last = ceil_div(extent - origin, dilation);
  return {first < taps ? first : taps, last < 0 ? 0 : (last < taps ? last : taps)};
}

/// Outputs o in [0, outputs) all of whose taps lie in [0, extent): they need no look at the border.
XSEP_HOST_DEVICE constexpr Range outputs_inside(int64_t outputs, int64_t extent, int64_t taps, int64_t stride,
                                                int64_t pad, int64_t dilation) {
  const int64_t first = ceil_div(pad, stride);
  const int64_t last = floor_div(extent - 1 - (taps - 1) * dilation + pad, stride) + 1;
  const int64_t begin = first < outputs ? first : outputs;
  return {begin, last < begin ? begin : (last < outputs ? last : outputs)};
}

static_assert(taps_inside(-1, 5, 3, 1).begin == 1 && taps_inside(3, 5, 3, 1).end == 2);
static_assert(outputs_inside(5, 5, 3, 1, 1, 1).begin == 1 && outputs_inside(5, 5, 3, 1, 1, 1).end == 4);

}  // namespace xsep
