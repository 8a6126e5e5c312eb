// Depthwise forward on a run of flat NHWC output pixels: the whole of the depthwise op and the first half of the
// fused one.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/geometry.h"
#include "activate.h"
#include "pair_depthwise.h"

namespace xsep::cpu {

enum class Storage { kFloat, kBFloat16, kHalf };

template <class T>
constexpr Storage storage_of() {
  if constexpr (std::is_same_v<T, float>) return Storage::kFloat;
  if constexpr (std::is_same_v<T, BFloat16>) return Storage::kBFloat16;
  return Storage::kHalf;
}

/// What is done to x on load. Costlier prologues are applied to the whole of x beforehand: here they would be
/// computed again for every row of the filter.
enum class Prologue {
  kNone,
  kClampedAffine,  // min(max(scale * x + shift, low), high)
};

/// Whether an input column is loaded once for all the outputs it belongs to, where the filter's width has a kernel.
inline bool slides(const DepthwiseShape& s) {
  return s.geometry.dilation_w == 1 && (s.geometry.stride_w == 1 || s.geometry.stride_w == 2);
}

/// Whether a width's rows are multiplied in pairs where storage is BFloat16. Seven columns of weights would not leave
/// enough registers for the sums.
constexpr bool has_pairs(int64_t filter_width) { return filter_width == 3 || filter_width == 5; }

/// A depth multiplier m is m passes of multiplier 1: pass i makes output channels i, m + i, 2 m + i, ..., with every
/// per-channel array stored pass by pass.
struct DepthwiseFprop {
  DepthwiseShape shape;
  int64_t c_pad;            // shape.c rounded up to kChannelPad
  const void* x;            // T [n, h, w, c]
  const float* w;           // [multiplier, r * s, c_pad]
  const uint32_t* w_pairs;  // [multiplier, pair_weights_size], or null where pairs are not multiplied
  int64_t c_pairs;
  Prologue prologue;
  const float* scale_p;  // [c_pad]; read with kClampedAffine only
  const float* shift_p;  // [c_pad]; likewise
  float low, high;       // likewise
  ChannelAffine output;  // scale and shift [multiplier, c_pad]
};

/// Output of a run: pixel i, channel j at out[i * stride + j], of the pass's own channels.
struct RunOutput {
  void* out;  // float, BFloat16 or Half, as storage says
  int64_t stride;
  Storage storage;
  int64_t row;  // pixels of a row of outputs where out is the whole of it in memory, 0 where it is a tile in the caches
};

namespace detail {

/// One block: adjacent output pixels of one row, channels [c_begin, c_end).
template <class T>
struct Block {
  const T* x;        // input pixel (picture, row of tap r_begin, column 0), channel 0
  int64_t row_step;  // elements between the input rows of consecutive r
  int64_t r_begin, r_end;
  int64_t column;           // input column of the first pixel's tap 0: may lie outside [0, w)
  int64_t width;            // input columns
  int64_t below;            // elements from x's row to the one below the last row of taps
  const float* w;           // [r * s, c_pad], tap (0, 0)
  const uint32_t* w_pairs;  // of the pass, or null
  ChannelAffine output;
  int64_t c_begin, c_end;
  void* out;  // first pixel, channel 0
};

template <class T, Prologue kPrologue>
struct Loader {
  Vec scale, shift, low, high;

  XSEP_INLINE Loader(const DepthwiseFprop& p, int64_t c) {
    if constexpr (kPrologue == Prologue::kClampedAffine) {
      scale = load(p.scale_p + c);
      shift = load(p.shift_p + c);
      low = broadcast(p.low);
      high = broadcast(p.high);
    }
  }
  XSEP_INLINE Vec operator()(Vec v) const {
    if constexpr (kPrologue == Prologue::kClampedAffine) return at_most(at_least(fma(v, scale, shift), low), high);
    return v;
  }
};

template <class T, int N>
XSEP_INLINE void store_column(T* out, int64_t stride, const Vec (&v)[N], int64_t lanes) {
  unroll<N>([&](auto i) __attribute__((always_inline)) {
    if (lanes == kLanes) {
      store(out + i * stride, v[i]);
    } else {
      store_first(out + i * stride, v[i], lanes);
    }
  });
}

/// float may be stored as anything, the 16-bit types as themselves or as float.
template <class T, int N>
XSEP_INLINE void store_pixels(const RunOutput& to, void* out, int64_t c, const Vec (&v)[N], int64_t lanes) {
  if (to.storage == storage_of<T>()) {
    store_column(static_cast<T*>(out) + c, to.stride, v, lanes);
  } else if (to.storage == Storage::kFloat) {
    store_column(static_cast<float*>(out) + c, to.stride, v, lanes);
  } else if constexpr (std::is_same_v<T, float>) {
    if (to.storage == Storage::kBFloat16) {
      store_column(static_cast<BFloat16*>(out) + c, to.stride, v, lanes);
    } else {
      store_column(static_cast<Half*>(out) + c, to.stride, v, lanes);
    }
  }
}

/// What the next row of outputs reads and this one does not, and where it is stored.
template <class T, int kS, int kStride, int kPixels>
XSEP_INLINE void prefetch_for_next_row(const RunOutput& to, const Block<T>& b, int64_t c_in, int64_t c) {
  const int64_t new_column = b.column + kS - kStride;
  for (int r = 0; r < kStride; ++r) {
    prefetch_pixels<kPixels * kStride>(b.x, b.below + (r * b.width + new_column) * c_in, c_in, c);
  }
  if (to.row > 0 && to.storage == storage_of<T>()) {
    prefetch_pixels<kPixels>(static_cast<const T*>(b.out), to.row * to.stride, to.stride, c);
  }
}

/// kPixels outputs of a filter kS wide with horizontal stride kStride and no dilation: each input column is loaded
/// once a filter row and multiplied into all the outputs it belongs to. kBorder: columns outside the picture are
/// skipped, and the last vector of channels may be incomplete.
template <class T, int kS, int kStride, int kPixels, Prologue kPrologue, bool kBorder>
void sliding_block(const DepthwiseFprop& p, const RunOutput& to, const Block<T>& b) {
  constexpr int kColumns = (kPixels - 1) * kStride + kS;
  static_assert(kColumns >= kS);
  const int64_t c_in = p.shape.c;
  const int64_t c_pad = p.c_pad;
  const int64_t first = std::max<int64_t>(-b.column, 0);
  const int64_t last = std::min<int64_t>(b.width - b.column, kColumns);
  const T* columns = b.x + b.column * c_in;
  for (int64_t c = b.c_begin; c < b.c_end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, b.c_end - c) : kLanes;
    prefetch_for_next_row<T, kS, kStride, kPixels>(to, b, c_in, c);
    const Loader<T, kPrologue> prologue(p, c);
    Vec sum[kPixels] = {};
    const auto add_row = [&](const T* row, const float* w_row) __attribute__((always_inline)) {
      Vec w[kS];
      unroll<kS>([&](auto s) __attribute__((always_inline)) { w[s] = load(w_row + s * c_pad); });
      unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
        if (kBorder && (j < first || j >= last)) return;
        const T* at = row + j * c_in;
        const Vec v = prologue(kBorder && lanes < kLanes ? load_first(at, lanes) : load(at));
        unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
          constexpr int s = j() - i() * kStride;
          if constexpr (s >= 0 && s < kS) sum[i] = fma(v, w[s], sum[i]);
        });
      });
    };
    const T* row = columns + c;
    const float* w_row = b.w + b.r_begin * kS * c_pad + c;
    if (kS == 3 && !kBorder && b.r_end - b.r_begin == 3) {
      // By far the most common: as one piece of code the three rows' loads and sums overlap.
      unroll<3>([&](auto r) __attribute__((always_inline)) { add_row(row + r * b.row_step, w_row + r * kS * c_pad); });
    } else {
      for (int64_t r = b.r_begin; r < b.r_end; ++r, row += b.row_step, w_row += kS * c_pad) add_row(row, w_row);
    }
    apply(b.output, c, sum);
    store_pixels<T>(to, b.out, c, sum, lanes);
  }
}

/// Any filter width, stride and dilation: a weight is loaded once for kPixels outputs, an input for every tap.
template <class T, int kPixels, Prologue kPrologue, bool kBorder>
void general_block(const DepthwiseFprop& p, const RunOutput& to, const Block<T>& b) {
  const int64_t c_in = p.shape.c;
  const int64_t stride = p.shape.geometry.stride_w;
  const int64_t dilation = p.shape.geometry.dilation_w;
  const int64_t taps = p.shape.s;
  for (int64_t c = b.c_begin; c < b.c_end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, b.c_end - c) : kLanes;
    const Loader<T, kPrologue> prologue(p, c);
    Vec sum[kPixels] = {};
    for (int64_t r = b.r_begin; r < b.r_end; ++r) {
      const T* row = b.x + (r - b.r_begin) * b.row_step + c;
      for (int64_t s = 0; s < taps; ++s) {
        const Vec w = load(b.w + (r * taps + s) * p.c_pad + c);
        const int64_t column = b.column + s * dilation;
        unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
          const int64_t at = column + i * stride;
          if (kBorder && (at < 0 || at >= b.width)) return;
          const Vec v = prologue(kBorder ? load_first(row + at * c_in, lanes) : load(row + at * c_in));
          sum[i] = fma(v, w, sum[i]);
        });
      }
    }
    apply(b.output, c, sum);
    store_pixels<T>(to, b.out, c, sum, lanes);
  }
}

#if defined(__AVX512BW__)
/// sliding_block for whole steps of kPairChannels channels.
template <int kS, int kStride, int kPixels, bool kBorder>
void pair_block(const DepthwiseFprop& p, const RunOutput& to, const Block<BFloat16>& b) {
  const int64_t c_in = p.shape.c;
  const int64_t first = std::max<int64_t>(-b.column, 0);
  const int64_t last = std::min<int64_t>(b.width - b.column, (kPixels - 1) * kStride + kS);
  for (int64_t c = b.c_begin; c < b.c_end; c += kPairChannels) {
    prefetch_for_next_row<BFloat16, kS, kStride, kPixels>(to, b, c_in, c);
    Vec low[kPixels] = {};
    Vec high[kPixels] = {};
    sum_pairs<kS, kStride, kPixels, kBorder>(b.x + b.column * c_in + c, b.row_step, c_in, first, last, b.w_pairs + c,
                                             p.shape.r, p.c_pairs, b.r_begin, b.r_end, low, high);
    unroll<kPixels>([&](auto i) __attribute__((always_inline)) { in_channel_order(low[i], high[i]); });
    apply(b.output, c, low);
    store_pixels<BFloat16>(to, b.out, c, low, kLanes);
    apply(b.output, c + kLanes, high);
    store_pixels<BFloat16>(to, b.out, c + kLanes, high, kLanes);
  }
}
#endif

/// kS = 0 is the general block.
template <class T, int kS, int kStride, int kPixels, Prologue kPrologue>
void block(const DepthwiseFprop& p, const RunOutput& to, Block<T> b, bool border) {
  const auto run = [&](auto with_border) __attribute__((always_inline)) {
    if constexpr (kS == 0) {
      general_block<T, kPixels, kPrologue, with_border()>(p, to, b);
    } else {
      sliding_block<T, kS, kStride, kPixels, kPrologue, with_border()>(p, to, b);
    }
  };
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, BFloat16> && kPrologue == Prologue::kNone && has_pairs(kS)) {
    if (b.w_pairs && b.c_begin % kPairChannels == 0 && b.c_end - b.c_begin >= kPairChannels) {
      const int64_t c_end = b.c_end;
      b.c_end -= (b.c_end - b.c_begin) % kPairChannels;
      if (border) {
        pair_block<kS, kStride, kPixels, true>(p, to, b);
      } else {
        pair_block<kS, kStride, kPixels, false>(p, to, b);
      }
      b.c_begin = b.c_end;
      b.c_end = c_end;
      if (b.c_begin == b.c_end) return;
    }
  }
#endif
  if (!border) {
    const int64_t c_end = b.c_end;
    b.c_end -= (b.c_end - b.c_begin) % kLanes;
    if (b.c_begin < b.c_end) run(std::false_type{});
    b.c_begin = b.c_end;
    b.c_end = c_end;
  }
  if (b.c_begin < b.c_end) run(std::true_type{});
}

template <class T, int kS, int kStride, Prologue kPrologue>
void run_rows(const DepthwiseFprop& p, int64_t pass, Range pixels, Range channels, const RunOutput& to) {
  const DepthwiseShape& shape = p.shape;
  const Geometry& g = shape.geometry;
  const int64_t element = to.storage == Storage::kFloat ? 4 : 2;
  const Range inside = outputs_inside(shape.q, shape.w, shape.s, g.stride_w, g.pad_left, g.dilation_w);
  ChannelAffine output = p.output;
  if (output.scale) output.scale += pass * p.c_pad;
  if (output.shift) output.shift += pass * p.c_pad;
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const int64_t row = pixel / shape.q;
    const int64_t row_end = std::min((row + 1) * shape.q, pixels.end);
    const int64_t picture = row / shape.p;
    const int64_t h = (row % shape.p) * g.stride_h - g.pad_top;
    const Range taps = taps_inside(h, shape.h, shape.r, g.dilation_h);
    Block<T> b;
    b.x = static_cast<const T*>(p.x) + ((picture * shape.h + h + taps.begin * g.dilation_h) * shape.w) * shape.c;
    b.row_step = g.dilation_h * shape.w * shape.c;
    b.r_begin = taps.begin;
    b.r_end = taps.end;
    b.width = shape.w;
    b.below = (taps.end - taps.begin - 1) * b.row_step + shape.w * shape.c;
    b.w = p.w + pass * shape.taps() * p.c_pad;
    b.w_pairs = p.w_pairs ? p.w_pairs + pass * pair_weights_size(shape.r, shape.s, p.c_pairs) : nullptr;
    b.output = output;
    b.c_begin = channels.begin;
    b.c_end = channels.end;
    while (pixel < row_end) {
      const int64_t q = pixel - row * shape.q;
      const int64_t left = row_end - pixel;
      b.column = q * g.stride_w - g.pad_left;
      b.out = static_cast<char*>(to.out) + (pixel - pixels.begin) * to.stride * element;
      const auto take = [&](auto count) __attribute__((always_inline)) {
        const bool border = q < inside.begin || q + count > inside.end;
        block<T, kS, kStride, count(), kPrologue>(p, to, b, border);
        pixel += count;
      };
      if (left >= 8) {
        take(std::integral_constant<int, 8>{});
      } else if (left >= 4) {
        take(std::integral_constant<int, 4>{});
      } else if (left >= 2) {
        take(std::integral_constant<int, 2>{});
      } else {
        take(std::integral_constant<int, 1>{});
      }
    }
  }
}

template <class T, int kS, int kStride>
void run_prologue(const DepthwiseFprop& p, int64_t pass, Range pixels, Range channels, const RunOutput& to) {
  if (p.prologue == Prologue::kNone) return run_rows<T, kS, kStride, Prologue::kNone>(p, pass, pixels, channels, to);
  return run_rows<T, kS, kStride, Prologue::kClampedAffine>(p, pass, pixels, channels, to);
}

template <class T, int kS>
void run_stride(const DepthwiseFprop& p, int64_t pass, Range pixels, Range channels, const RunOutput& to) {
  if (p.shape.geometry.stride_w == 1) return run_prologue<T, kS, 1>(p, pass, pixels, channels, to);
  return run_prologue<T, kS, 2>(p, pass, pixels, channels, to);
}

}  // namespace detail

/// Channels [channels.begin, channels.end) of one pass for output pixels [pixels.begin, pixels.end), counted over N, P
/// and Q. channels.begin is a multiple of kChannelPad.
template <class T>
void depthwise_fprop_run(const DepthwiseFprop& p, int64_t pass, Range pixels, Range channels, const RunOutput& to) {
  if (slides(p.shape)) {
    if (p.shape.s == 3) return detail::run_stride<T, 3>(p, pass, pixels, channels, to);
    if (p.shape.s == 5) return detail::run_stride<T, 5>(p, pass, pixels, channels, to);
    if (p.shape.s == 7) return detail::run_stride<T, 7>(p, pass, pixels, channels, to);
  }
  detail::run_prologue<T, 0, 1>(p, pass, pixels, channels, to);
}

}  // namespace xsep::cpu
