// Depthwise forward on a run of flat NHWC output pixels: the whole of the depthwise op and the first half of the
// fused one.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/geometry.h"
#include "activate.h"
#include "channels.h"
#include "input_rows.h"
#include "pair_depthwise.h"

namespace xsep::cpu {

enum class Storage { kFloat, kBFloat16, kHalf };

template <class T>
constexpr Storage storage_of() {
  if constexpr (std::is_same_v<T, float>) return Storage::kFloat;
  if constexpr (std::is_same_v<T, BFloat16>) return Storage::kBFloat16;
  return Storage::kHalf;
}

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
  int64_t c_pad;            // table_row(shape.c)
  InputRows input;          // of the type the kernels are called for, once they are brought
  const float* w;           // [multiplier, r * s, c_pad]
  const uint32_t* w_pairs;  // [multiplier, pair_weights_size], or null where pairs are not multiplied
  int64_t c_pairs;
  ChannelAffine output;  // scale and shift [multiplier, c_pad]
};

/// Output of a run: pixel i, channel j of pass k at out[i * stride + k * c + j].
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
  const T* const* rows;  // input rows of taps [r_begin, r_end), from column 0 and channel 0 on
  int64_t r_begin, r_end;
  int64_t pixel_step;       // elements between the pixels of a row
  int64_t q;                // of the first pixel
  int64_t column;           // input column of the first pixel's tap 0: may lie outside [0, width)
  int64_t width;            // input columns
  const Ahead* ahead;       // what the next row of outputs will read
  const float* w;           // [r * s, c_pad], tap (0, 0)
  const uint32_t* w_pairs;  // of the pass, or null
  ChannelAffine output;
  int64_t c_begin, c_end;
  void* out;  // first pixel, channel 0
};

template <class T, int N>
XSEP_INLINE void store_column(T* out, int64_t stride, const Vec (&v)[N], int64_t lanes) {
  unroll<N>([&](auto i) __attribute__((always_inline)) { store_lanes(out + i * stride, v[i], lanes); });
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

/// What lies in x where the next row will be brought from planes; on its own, to take no registers from the blocks.
template <int kStride>
__attribute__((noinline)) void prefetch_planes(const Ahead& a, int64_t column, int64_t c) {
  for (int r = 0; r < kStride; ++r) prefetch_pieces<kLanes>(a.at(column, c) + r * a.row_bytes, a.channel_bytes);
}

/// What the next row of outputs reads and this one does not, and where it is stored.
template <class T, int kS, int kStride, int kPixels>
XSEP_INLINE void prefetch_for_next_row(const RunOutput& to, const Block<T>& b, int64_t c) {
  const Ahead& a = *b.ahead;
  if (a.planes) {
    prefetch_planes<kStride>(a, b.q * kStride, c);
  } else if (a.row && c * a.channel_bytes % kLineBytes == 0) {
    const uintptr_t at = a.at(b.q * kStride, c);
    for (int r = 0; r < kStride; ++r) prefetch_pieces<kPixels * kStride>(at + r * a.row_bytes, a.pixel_bytes);
  }
  if (to.row > 0 && to.storage == storage_of<T>()) {
    prefetch_pixels<kPixels>(static_cast<const T*>(b.out), to.row * to.stride, to.stride, c);
  }
}

/// kPixels outputs of a filter kS wide with horizontal stride kStride and no dilation: each input column is loaded
/// once a filter row and multiplied into all the outputs it belongs to. kBorder: columns outside the picture are
/// skipped, and the last vector of channels may be incomplete.
template <class T, int kS, int kStride, int kPixels, bool kBorder>
void sliding_block(const DepthwiseFprop& p, const RunOutput& to, const Block<T>& b) {
  constexpr int kColumns = (kPixels - 1) * kStride + kS;
  static_assert(kColumns >= kS);
  const int64_t step = b.pixel_step;
  const int64_t c_pad = p.c_pad;
  const int64_t first = std::max<int64_t>(-b.column, 0);
  const int64_t last = std::min<int64_t>(b.width - b.column, kColumns);
  for (int64_t c = b.c_begin; c < b.c_end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, b.c_end - c) : kLanes;
    prefetch_for_next_row<T, kS, kStride, kPixels>(to, b, c);
    const int64_t offset = b.column * step + c;
    Vec sum[kPixels];
    set_zero(sum);
    const auto add_row = [&](const T* row, const float* w_row) __attribute__((always_inline)) {
      Vec w[kS];
      unroll<kS>([&](auto s) __attribute__((always_inline)) { w[s] = load(w_row + s * c_pad); });
      unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
        if (kBorder && (j < first || j >= last)) return;
        const T* at = row + j * step;
        const Vec v = in_register(kBorder ? load_lanes(at, lanes) : load(at));
        unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
          constexpr int s = j() - i() * kStride;
          if constexpr (s >= 0 && s < kS) sum[i] = fma(v, w[s], sum[i]);
        });
      });
    };
    const int64_t rows = b.r_end - b.r_begin;
    const float* w_row = b.w + b.r_begin * kS * c_pad + c;
    if (kS == 3 && !kBorder && rows == 3) {
      // By far the most common: as one piece of code the three rows' loads and sums overlap.
      unroll<3>([&](auto r) __attribute__((always_inline)) { add_row(b.rows[r] + offset, w_row + r * kS * c_pad); });
    } else {
      for (int64_t r = 0; r < rows; ++r, w_row += kS * c_pad) add_row(b.rows[r] + offset, w_row);
    }
    apply(b.output, c, sum);
    store_pixels<T>(to, b.out, c, sum, lanes);
  }
}

/// Any filter width, stride and dilation: a weight is loaded once for kPixels outputs, an input for every tap.
template <class T, int kPixels, bool kBorder>
void general_block(const DepthwiseFprop& p, const RunOutput& to, const Block<T>& b) {
  const int64_t stride = p.shape.geometry.stride_w;
  const int64_t dilation = p.shape.geometry.dilation_w;
  const int64_t taps = p.shape.s;
  for (int64_t c = b.c_begin; c < b.c_end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, b.c_end - c) : kLanes;
    Vec sum[kPixels];
    set_zero(sum);
    for (int64_t r = b.r_begin; r < b.r_end; ++r) {
      const T* row = b.rows[r - b.r_begin] + c;
      for (int64_t s = 0; s < taps; ++s) {
        const Vec w = load(b.w + (r * taps + s) * p.c_pad + c);
        const int64_t column = b.column + s * dilation;
        unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
          const int64_t at = column + i * stride;
          if (kBorder && (at < 0 || at >= b.width)) return;
          const T* from = row + at * b.pixel_step;
          sum[i] = fma(kBorder ? load_lanes(from, lanes) : load(from), w, sum[i]);
        });
      }
    }
    apply(b.output, c, sum);
    store_pixels<T>(to, b.out, c, sum, lanes);
  }
}

#if defined(__AVX512BW__)
/// sliding_block by steps of kPairChannels channels, of which the last may be incomplete.
template <int kS, int kStride, int kPixels, bool kBorder>
void pair_block(const DepthwiseFprop& p, const RunOutput& to, const Block<BFloat16>& b) {
  const int64_t first = std::max<int64_t>(-b.column, 0);
  const int64_t last = std::min<int64_t>(b.width - b.column, (kPixels - 1) * kStride + kS);
  const int64_t w_row = table_row(p.c_pairs);
  for (int64_t c = b.c_begin; c < b.c_end; c += kPairChannels) {
    const int64_t channels = kBorder ? std::min(kPairChannels, b.c_end - c) : kPairChannels;
    prefetch_for_next_row<BFloat16, kS, kStride, kPixels>(to, b, c);
    Vec low[kPixels] = {};  // not by set_zero, with which this loop was slower
    Vec high[kPixels] = {};
    sum_pairs<kS, kStride, kPixels, kBorder>(b.rows, b.column * b.pixel_step + c, b.pixel_step, first, last,
                                             b.w_pairs + c, p.shape.r, w_row, b.r_begin, b.r_end, channels, low, high);
    unroll<kPixels>([&](auto i) __attribute__((always_inline)) { in_channel_order(low[i], high[i]); });
    apply(b.output, c, low);
    store_pixels<BFloat16>(to, b.out, c, low, kLanes);
    apply(b.output, c + kLanes, high);
    store_pixels<BFloat16>(to, b.out, c + kLanes, high, channels - kLanes);
  }
}
#endif

/// kS = 0 is the general block.
template <class T, int kS, int kStride, int kPixels>
void block(const DepthwiseFprop& p, const RunOutput& to, Block<T> b, bool border) {
  const auto run = [&](auto with_border) __attribute__((always_inline)) {
    if constexpr (kS == 0) {
      general_block<T, kPixels, with_border()>(p, to, b);
    } else {
      sliding_block<T, kS, kStride, kPixels, with_border()>(p, to, b);
    }
  };
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, BFloat16> && has_pairs(kS)) {
    const int64_t paired = b.w_pairs && b.c_begin % kPairChannels == 0 ? paired_channels(b.c_end - b.c_begin) : 0;
    if (paired > 0) {
      const int64_t c_end = b.c_end;
      b.c_end = b.c_begin + paired;
      with_border<kPairChannels>(border, b.c_begin, b.c_end, [&](auto with) __attribute__((always_inline)) {
        pair_block<kS, kStride, kPixels, with()>(p, to, b);
      });
      b.c_begin = b.c_end;
      b.c_end = c_end;
      if (b.c_begin == b.c_end) return;
    }
  }
#endif
  with_border<kLanes>(border, b.c_begin, b.c_end, run);
}

/// A row's outputs [begin, end) in blocks as long as fit; b.out is the first one's.
template <class T, int kS, int kStride>
void run_row(const DepthwiseFprop& p, const RunOutput& to, Block<T> b, Range outputs, Range inside, int64_t origin) {
  const int64_t element = to.storage == Storage::kFloat ? 4 : 2;
  for (int64_t q = outputs.begin; q < outputs.end;) {
    b.q = q;
    b.column = q * p.shape.geometry.stride_w - origin;
    const auto take = [&](auto count) __attribute__((always_inline)) {
      const bool border = q < inside.begin || q + count > inside.end;
      block<T, kS, kStride, count()>(p, to, b, border);
      b.out = static_cast<char*>(b.out) + count * to.stride * element;
      q += count;
    };
    const int64_t left = outputs.end - q;
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

template <class T, int kS, int kStride>
void run_rows(const DepthwiseFprop& p, Range pixels, Range channels, const RunOutput& to, RowWindow& window) {
  const DepthwiseShape& shape = p.shape;
  const Geometry& g = shape.geometry;
  const int64_t element = to.storage == Storage::kFloat ? 4 : 2;
  const bool brought = p.input.bring != nullptr;
  // Brought rows have the padding with them.
  const Range inside =
      brought ? Range{0, shape.q} : outputs_inside(shape.q, shape.w, shape.s, g.stride_w, g.pad_left, g.dilation_w);
  const int64_t row_elements = shape.w * shape.c;
  constexpr int64_t kBytes = sizeof(T);
  std::vector<const T*> rows(static_cast<size_t>(shape.r));
  Block<T> b{};
  b.rows = rows.data();
  b.pixel_step = brought ? p.input.pixel_step : shape.c;
  b.width = brought ? p.input.row_columns : shape.w;
  b.c_begin = channels.begin;
  b.c_end = channels.end;
  Ahead ahead{0, shape.c * kBytes, kBytes, row_elements * kBytes, false};
  b.ahead = &ahead;
  // Below the last row of taps, right of the first output's last tap but for what the output to its left has read.
  const int64_t ahead_shift = (row_elements + (shape.s - g.stride_w - g.pad_left) * shape.c) * kBytes;
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const int64_t row = pixel / shape.q;
    const Range outputs{pixel - row * shape.q, std::min(shape.q, pixels.end - row * shape.q)};
    const int64_t picture = row / shape.p;
    const int64_t h = (row % shape.p) * g.stride_h - g.pad_top;
    const Range taps = taps_inside(h, shape.h, shape.r, g.dilation_h);
    b.r_begin = taps.begin;
    b.r_end = taps.end;
    if (brought && taps.begin < taps.end) {
      window.need(picture, {h + taps.begin * g.dilation_h, h + (taps.end - 1) * g.dilation_h + 1}, channels);
    }
    for (int64_t t = taps.begin; t < taps.end; ++t) {
      const int64_t at = h + t * g.dilation_h;
      rows[static_cast<size_t>(t - taps.begin)] =
          brought ? static_cast<const T*>(window.row(at)) - channels.begin
                  : static_cast<const T*>(p.input.x) + (picture * shape.h + at) * row_elements;
    }
    if (brought) {
      ahead = window.ahead();
    } else if (taps.begin < taps.end) {
      ahead.row = reinterpret_cast<uintptr_t>(rows[static_cast<size_t>(taps.end - taps.begin - 1)]) + ahead_shift;
    }
    for (int64_t pass = 0; pass < shape.multiplier; ++pass) {
      b.w = p.w + pass * shape.taps() * p.c_pad;
      b.w_pairs = p.w_pairs ? p.w_pairs + pass * pair_weights_size(shape.r, shape.s, p.c_pairs) : nullptr;
      b.output = p.output;
      if (b.output.scale) b.output.scale += pass * p.c_pad;
      if (b.output.shift) b.output.shift += pass * p.c_pad;
      b.out = static_cast<char*>(to.out) + ((pixel - pixels.begin) * to.stride + pass * shape.c) * element;
      run_row<T, kS, kStride>(p, to, b, outputs, inside, brought ? 0 : g.pad_left);
    }
    pixel += outputs.end - outputs.begin;
  }
}

template <class T, int kS>
void run_stride(const DepthwiseFprop& p, Range pixels, Range channels, const RunOutput& to, RowWindow& window) {
  if (p.shape.geometry.stride_w == 1) return run_rows<T, kS, 1>(p, pixels, channels, to, window);
  return run_rows<T, kS, 2>(p, pixels, channels, to, window);
}

}  // namespace detail

/// Addresses in x of what a run of outputs will be the first to read, after those before it; empty where that is not
/// one piece.
inline Range input_of_next_run(const DepthwiseFprop& p, Range pixels, const RowWindow& window) {
  const DepthwiseShape& s = p.shape;
  const Geometry& g = s.geometry;
  if (pixels.begin >= pixels.end) return {0, 0};
  // The last row of an output's taps, counted over all pictures: below one picture is the next one.
  const auto last_row = [&](int64_t pixel) {
    const int64_t row = pixel / s.q;
    const int64_t h = row % s.p * g.stride_h - g.pad_top + (s.r - 1) * g.dilation_h;
    return row / s.p * s.h + std::clamp<int64_t>(h, 0, s.h - 1);
  };
  if (p.input.bring) return window.missing(last_row(pixels.end - 1));
  if (g.stride_h != 1 || g.stride_w != 1) return {0, 0};
  const int64_t pixel_bytes = s.c * p.input.x_element_bytes;
  const int64_t column = std::clamp<int64_t>(pixels.begin % s.q - g.pad_left + (s.s - 1) * g.dilation_w, 0, s.w - 1);
  const int64_t first = last_row(pixels.begin) * s.w + column;
  const int64_t x = reinterpret_cast<int64_t>(p.input.x);
  return {x + first * pixel_bytes, x + (first + pixels.end - pixels.begin) * pixel_bytes};
}

/// Channels [channels.begin, channels.end) of every pass for output pixels [pixels.begin, pixels.end), counted over N,
/// P and Q. channels.begin is a multiple of kChannelPad. T is the type of brought rows, or x's own.
template <class T>
void depthwise_fprop_run(const DepthwiseFprop& p, Range pixels, Range channels, const RunOutput& to,
                         RowWindow& window) {
  if (slides(p.shape)) {
    if (p.shape.s == 3) return detail::run_stride<T, 3>(p, pixels, channels, to, window);
    if (p.shape.s == 5) return detail::run_stride<T, 5>(p, pixels, channels, to, window);
    if (p.shape.s == 7) return detail::run_stride<T, 7>(p, pixels, channels, to, window);
  }
  detail::run_rows<T, 0, 1>(p, pixels, channels, to, window);
}

}  // namespace xsep::cpu
