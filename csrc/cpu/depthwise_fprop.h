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
constexpr int64_t element_bytes(Storage s) { return s == Storage::kFloat ? 4 : 2; }

template <class T>
constexpr Storage storage_of() {
  if constexpr (std::is_same_v<T, float>) return Storage::kFloat;
  if constexpr (std::is_same_v<T, BFloat16>) return Storage::kBFloat16;
  return Storage::kHalf;
}

/// Whether an input column is loaded once for all the outputs it belongs to, where the filter's width has a kernel.
/// With a dilation these lie as far apart as its taps (take_apart), which pays where that leaves more than an output by
/// itself, and is little beside the work.
inline bool slides(const DepthwiseShape& s) {
  const int64_t d = s.geometry.dilation_w;
  if (d == 1) return s.geometry.stride_w == 1 || s.geometry.stride_w == 2;
  constexpr int64_t kVectorsApart = 16;
  return s.geometry.stride_w == 1 && 2 * s.q >= 3 * d && s.q * s.c >= kVectorsApart * kLanes * d;
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
  int64_t row;  // elements of a row of outputs where out is all of it in memory, 0 where it is a tile in the caches
};

namespace detail {

/// Outputs of one row, and what they are of. A block is some adjacent ones of them.
template <class T>
struct RowPart {
  const T* const* rows;  // input rows of taps [r_begin, r_end), from column 0 and channel 0 on
  int64_t r_begin, r_end;
  int64_t pixel_step;       // elements between the pixels of a row
  int64_t width;            // input columns
  int64_t origin;           // columns of padding before them that are no part of rows
  const Ahead* ahead;       // what the next row of outputs will read
  const float* w;           // [r * s, c_pad], tap (0, 0)
  const uint32_t* w_pairs;  // of the pass, or null
  ChannelAffine output;
  Range channels;
  Range outputs;
  Range inside;  // those outputs that have all their columns within the picture
  RunOutput to;  // the first output, channel 0
};

template <class T, int N>
XSEP_INLINE void store_column(T* out, int64_t stride, const Vec (&v)[N], int64_t lanes) {
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) store_lanes(out + i * stride, v[i], lanes);
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
XSEP_NOINLINE void prefetch_planes(const Ahead& a, int64_t column, int64_t c) {
  for (int r = 0; r < kStride; ++r) prefetch_pieces<kLanes>(a.at(column, c) + r * a.row_bytes, a.channel_bytes);
}

/// What the next row of outputs reads and this one does not, and where it is stored.
template <class T, int kStride, int kPixels>
XSEP_INLINE void prefetch_for_next_row(const RowPart<T>& part, int64_t column, const void* out, int64_t c) {
  const Ahead& a = *part.ahead;
  const RunOutput& to = part.to;
  if (a.planes) {
    prefetch_planes<kStride>(a, column + part.origin, c);
  } else if (a.row && c * a.channel_bytes % kLineBytes == 0) {
    const uintptr_t at = a.at(column + part.origin, c);
    for (int r = 0; r < kStride; ++r) prefetch_pieces<kPixels * kStride>(at + r * a.row_bytes, a.pixel_bytes);
  }
  if (to.row > 0 && to.storage == storage_of<T>()) {
    prefetch_pixels<kPixels>(static_cast<const T*>(out), to.row, to.stride, c);
  }
}

/// kPixels outputs of a filter kS wide with horizontal stride kStride and no dilation: each input column is loaded
/// once a filter row and multiplied into all the outputs it belongs to. column: the input's, of the first output's tap
/// 0; it may lie outside [0, width). kBorder: columns outside the picture are skipped, and the last vector of channels
/// may be incomplete.
template <class T, int kS, int kStride, int kPixels, bool kBorder>
XSEP_NOINLINE void sliding_block(const DepthwiseFprop& p, const RowPart<T>& part, int64_t column, void* out,
                                 Range channels) {
  constexpr int kColumns = (kPixels - 1) * kStride + kS;
  static_assert(kColumns >= kS);
  // Eight sums, seven weights and an input would be all the registers of a level with sixteen: GCC would spill many.
  constexpr int kHeld = kRegisters == 16 && kPixels + kS >= 15 ? kS - 1 : kS;
  const int64_t step = part.pixel_step;
  const int64_t c_pad = p.c_pad;
  const int64_t first = std::max<int64_t>(-column, 0);
  const int64_t last = std::min<int64_t>(part.width - column, kColumns);
  for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, channels.end - c) : kLanes;
    prefetch_for_next_row<T, kStride, kPixels>(part, column, out, c);
    const int64_t offset = column * step + c;
    Vec sum[kPixels];
    set_zero(sum);
    const auto add_row = [&](const T* row, const float* w_row) __attribute__((always_inline)) {
      Vec w[kHeld];
      XSEP_UNROLL
      for (int s = 0; s < kHeld; ++s) w[s] = load(w_row + s * c_pad);
      const T* at = row;
      XSEP_UNROLL
      for (int j = 0; j < kColumns; ++j, at += step) {
        if (kBorder && (j < first || j >= last)) continue;
        const Vec v = in_register(kBorder ? load_lanes(at, lanes) : load(at));
        XSEP_UNROLL
        for (int i = 0; i < kPixels; ++i) {
          const int s = j - i * kStride;
          if (s >= 0 && s < kHeld) sum[i] = fma(v, w[s], sum[i]);
          if (s >= kHeld && s < kS) sum[i] = fma(v, load_for_this_use(w_row + s * c_pad), sum[i]);
        }
      }
    };
    const int64_t rows = part.r_end - part.r_begin;
    const float* w_row = part.w + part.r_begin * kS * c_pad + c;
    if (kS == 3 && !kBorder && rows == 3) {
      // By far the most common: as one piece of code the three rows' loads and sums overlap.
      XSEP_UNROLL
      for (int r = 0; r < 3; ++r) add_row(part.rows[r] + offset, w_row + r * kS * c_pad);
    } else {
      for (int64_t r = 0; r < rows; ++r, w_row += kS * c_pad) add_row(part.rows[r] + offset, w_row);
    }
    apply(part.output, c, sum);
    store_pixels<T>(part.to, out, c, sum, lanes);
  }
}

/// Any filter width, stride and dilation: a weight is loaded once for kPixels outputs, an input for every tap.
template <class T, int kPixels, bool kBorder>
XSEP_NOINLINE void general_block(const DepthwiseFprop& p, const RowPart<T>& part, int64_t first, void* out,
                                 Range channels) {
  const int64_t stride = p.shape.geometry.stride_w;
  const int64_t dilation = p.shape.geometry.dilation_w;
  const int64_t taps = p.shape.s;
  for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
    const int64_t lanes = kBorder ? std::min<int64_t>(kLanes, channels.end - c) : kLanes;
    Vec sum[kPixels];
    set_zero(sum);
    for (int64_t r = part.r_begin; r < part.r_end; ++r) {
      const T* row = part.rows[r - part.r_begin] + c;
      for (int64_t s = 0; s < taps; ++s) {
        const Vec w = load(part.w + (r * taps + s) * p.c_pad + c);
        const int64_t column = first + s * dilation;
        XSEP_UNROLL
        for (int i = 0; i < kPixels; ++i) {
          const int64_t at = column + i * stride;
          if (kBorder && (at < 0 || at >= part.width)) continue;
          const T* from = row + at * part.pixel_step;
          sum[i] = fma(kBorder ? load_lanes(from, lanes) : load(from), w, sum[i]);
        }
      }
    }
    apply(part.output, c, sum);
    store_pixels<T>(part.to, out, c, sum, lanes);
  }
}

#if defined(__AVX512BW__)
/// sliding_block by steps of kPairChannels channels, of which the last may be incomplete.
template <int kS, int kStride, int kPixels, bool kBorder>
XSEP_NOINLINE void pair_block(const DepthwiseFprop& p, const RowPart<BFloat16>& part, int64_t column, void* out,
                              Range channels) {
  const int64_t first = std::max<int64_t>(-column, 0);
  const int64_t last = std::min<int64_t>(part.width - column, (kPixels - 1) * kStride + kS);
  const int64_t w_row = table_row(p.c_pairs);
  for (int64_t c = channels.begin; c < channels.end; c += kPairChannels) {
    const int64_t count = kBorder ? std::min(kPairChannels, channels.end - c) : kPairChannels;
    prefetch_for_next_row<BFloat16, kStride, kPixels>(part, column, out, c);
    Vec low[kPixels] = {};  // not by set_zero, with which this loop was slower
    Vec high[kPixels] = {};
    sum_pairs<kS, kStride, kPixels, kBorder>(part.rows, column * part.pixel_step + c, part.pixel_step, first, last,
                                             part.w_pairs + c, p.shape.r, w_row, part.r_begin, part.r_end, count, low,
                                             high);
    XSEP_UNROLL
    for (int i = 0; i < kPixels; ++i) in_channel_order(low[i], high[i]);
    apply(part.output, c, low);
    store_pixels<BFloat16>(part.to, out, c, low, kLanes);
    apply(part.output, c + kLanes, high);
    store_pixels<BFloat16>(part.to, out, c + kLanes, high, count - kLanes);
  }
}
#endif

/// kS = 0 is the general block. border: not all the columns lie within the picture.
template <class T, int kS, int kStride, int kPixels>
XSEP_INLINE void block(const DepthwiseFprop& p, const RowPart<T>& part, int64_t column, void* out, bool border) {
  int64_t c = part.channels.begin, c_end = part.channels.end;
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, BFloat16> && has_pairs(kS)) {
    const int64_t paired = part.w_pairs && c % kPairChannels == 0 ? paired_channels(c_end - c) : 0;
    if (paired > 0) {
      c_end = c + paired;
      with_border<kPairChannels>(border, c, c_end, [&](auto with) __attribute__((always_inline)) {
        pair_block<kS, kStride, kPixels, with()>(p, part, column, out, {c, c_end});
      });
      c = c_end;
      c_end = part.channels.end;
    }
  }
#endif
  with_border<kLanes>(border, c, c_end, [&](auto with) __attribute__((always_inline)) {
    if constexpr (kS == 0) {
      general_block<T, kPixels, with()>(p, part, column, out, {c, c_end});
    } else {
      sliding_block<T, kS, kStride, kPixels, with()>(p, part, column, out, {c, c_end});
    }
  });
}

/// In blocks as long as fit.
template <class T, int kS, int kStride>
void run_row(const DepthwiseFprop& p, const RowPart<T>& part) {
  const int64_t output_bytes = part.to.stride * element_bytes(part.to.storage);
  auto* out = static_cast<char*>(part.to.out);
  for (int64_t q = part.outputs.begin; q < part.outputs.end;) {
    const auto take = [&](auto count) __attribute__((always_inline)) {
      const bool border = q < part.inside.begin || q + count > part.inside.end;
      block<T, kS, kStride, count()>(p, part, q * p.shape.geometry.stride_w - part.origin, out, border);
      out += count * output_bytes;
      q += count;
    };
    const int64_t left = part.outputs.end - q;
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

/// Part `i` of a row whose filter has a dilation d: the outputs from the i-th on that lie d apart. They and the columns
/// that they read are a row by themselves, in longer steps, and its filter has no dilation. rows and ahead are memory
/// for what the part points to.
template <class T>
RowPart<T> take_apart(const RowPart<T>& whole, int64_t d, int64_t i, const T** rows, Ahead& ahead) {
  // The first output's first tap is column `first` of a row that begins with column `at` of the whole one.
  const int64_t q = whole.outputs.begin + i, column = q - whole.origin;
  const int64_t first = floor_div(column, d), at = column - first * d;
  const auto output = [&](int64_t of_whole) { return first + ceil_div(of_whole - q, d); };
  for (int64_t t = 0; t < whole.r_end - whole.r_begin; ++t) rows[t] = whole.rows[t] + at * whole.pixel_step;
  ahead = *whole.ahead;
  if (ahead.row) ahead.row = ahead.at(q - first * d, 0);
  ahead.pixel_bytes *= d;
  RowPart<T> part = whole;
  part.rows = rows;
  part.pixel_step *= d;
  part.width = ceil_div(whole.width - at, d);
  part.origin = 0;
  part.ahead = &ahead;
  part.outputs = {first, output(whole.outputs.end)};
  part.inside = {output(whole.inside.begin), output(whole.inside.end)};
  part.to.out = static_cast<char*>(whole.to.out) + i * whole.to.stride * element_bytes(whole.to.storage);
  part.to.stride *= d;
  return part;
}

template <class T, int kS, int kStride>
void run_rows(const DepthwiseFprop& p, Range pixels, Range channels, const RunOutput& to, RowWindow& window) {
  const DepthwiseShape& shape = p.shape;
  const Geometry& g = shape.geometry;
  const bool brought = p.input.bring != nullptr;
  // Brought rows have the padding with them.
  const Range inside =
      brought ? Range{0, shape.q} : outputs_inside(shape.q, shape.w, shape.s, g.stride_w, g.pad_left, g.dilation_w);
  const int64_t row_elements = shape.w * shape.c;
  constexpr int64_t kBytes = sizeof(T);
  std::vector<const T*> rows(static_cast<size_t>(shape.r));
  RowPart<T> part{};
  part.rows = rows.data();
  part.pixel_step = brought ? p.input.pixel_step : shape.c;
  part.width = brought ? p.input.row_columns : shape.w;
  part.origin = brought ? 0 : g.pad_left;
  part.channels = channels;
  part.inside = inside;
  part.to = to;
  Ahead ahead{0, shape.c * kBytes, kBytes, row_elements * kBytes, false};
  part.ahead = &ahead;
  const int64_t apart = kS > 0 && kStride == 1 ? g.dilation_w : 1;
  std::vector<const T*> rows_apart(apart > 1 ? rows.size() : 0);
  Ahead ahead_apart{};
  // Below the last row of taps, right of the first output's last tap but for what the output to its left has read.
  const int64_t reach = (shape.s - 1) * g.dilation_w + 1 - g.stride_w - g.pad_left;
  const int64_t ahead_shift = (row_elements + reach * shape.c) * kBytes;
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
    const int64_t row = pixel / shape.q;
    const Range outputs{pixel - row * shape.q, std::min(shape.q, pixels.end - row * shape.q)};
    const int64_t picture = row / shape.p;
    const int64_t h = (row % shape.p) * g.stride_h - g.pad_top;
    const Range taps = taps_inside(h, shape.h, shape.r, g.dilation_h);
    part.r_begin = taps.begin;
    part.r_end = taps.end;
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
      part.w = p.w + pass * shape.taps() * p.c_pad;
      part.w_pairs = p.w_pairs ? p.w_pairs + pass * pair_weights_size(shape.r, shape.s, p.c_pairs) : nullptr;
      part.output = p.output;
      if (part.output.scale) part.output.scale += pass * p.c_pad;
      if (part.output.shift) part.output.shift += pass * p.c_pad;
      const int64_t before = (pixel - pixels.begin) * to.stride + pass * shape.c;
      part.to.out = static_cast<char*>(to.out) + before * element_bytes(to.storage);
      part.outputs = outputs;
      if (apart == 1) {
        run_row<T, kS, kStride>(p, part);
        continue;
      }
      for (int64_t i = 0; i < std::min(apart, outputs.end - outputs.begin); ++i) {
        run_row<T, kS, kStride>(p, take_apart(part, apart, i, rows_apart.data(), ahead_apart));
      }
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
