// Rows of a depthwise convolution's input in a thread's own memory: turned round from NCHW, the prologue applied, zeros
// left and right for the padding. Runs of outputs go down the picture, so a thread brings each row once.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/geometry.h"
#include "activate.h"
#include "channels.h"
#include "transpose.h"

namespace xsep::cpu {

/// Addresses in x of a row that has not been read yet.
struct Ahead {
  uintptr_t row;  // where the columns start that the first output adds, channel 0; 0: nothing is to be fetched
  int64_t pixel_bytes, channel_bytes;
  int64_t row_bytes;  // to the row below
  bool planes;        // channels are far apart, not pixels

  uintptr_t at(int64_t column, int64_t c) const { return row + column * pixel_bytes + c * channel_bytes; }
};

/// How rows are brought, and how they lie: row h of a picture in slot h % slots.
struct InputRows {
  /// Channels of rows of a picture to where they belong in a thread's memory.
  using Bring = void (*)(const InputRows&, int64_t picture, Range rows, Range channels, char* memory);

  Bring bring;    // null: x is NHWC and of the kernels' type, and read where it lies
  const void* x;  // [n, c, h, w] if nchw, else [n, h, w, c]
  bool nchw;
  int64_t c, h, w;
  ChannelAffine prologue;  // scale and shift [c_pad]
  int64_t slots;
  int64_t at_once;            // rows brought together
  int64_t left, row_columns;  // of a slot: columns of zeros, then w, then zeros up to row_columns
  int64_t pixel_step;         // elements
  int64_t element_bytes;
  int64_t x_element_bytes;

  int64_t row_elements() const { return row_columns * pixel_step; }
  int64_t row_bytes() const { return row_elements() * element_bytes; }
  Ahead ahead(int64_t picture, int64_t row) const {
    const int64_t e = x_element_bytes, pixel = nchw ? 1 : c;
    const int64_t elements = picture * c * h * w + row * w * pixel;
    return {reinterpret_cast<uintptr_t>(x) + elements * e, pixel * e, (nchw ? h * w : 1) * e, w * pixel * e, nchw};
  }
  /// Of a thread.
  int64_t bytes() const { return bring ? round_up(slots * row_bytes(), 64) : 0; }
};

/// Elements from pixel to pixel where a row is brought. A distance of many small powers of two would put a filter's
/// taps into few sets of the first-level cache.
inline int64_t brought_pixel_step(int64_t channels, int64_t element_bytes) {
  constexpr int64_t kLine = 64, kBadDistance = 512;
  const int64_t bytes = round_up(channels * element_bytes, kLine);
  return (bytes % kBadDistance == 0 ? bytes + kLine : bytes) / element_bytes;
}

/// The rows that one thread has.
class RowWindow {
 public:
  /// memory: rows.bytes(), not yet written.
  RowWindow(const InputRows& rows, void* memory) : rows_(rows), memory_(static_cast<char*>(memory)) {
    if (!rows.bring) return;
    const int64_t pixel_bytes = rows.pixel_step * rows.element_bytes;
    const int64_t right = rows.left + rows.w;
    for (int64_t i = 0; i < rows.slots; ++i) {
      char* row = memory_ + i * rows.row_bytes();
      std::memset(row, 0, rows.left * pixel_bytes);
      std::memset(row + right * pixel_bytes, 0, (rows.row_columns - right) * pixel_bytes);
    }
  }

  /// What was brought is of other channels than what will be needed.
  void forget() { there_ = {0, 0}; }

  /// Brings what is missing of rows `needed` of a picture; they fit the slots.
  void need(int64_t picture, Range needed, Range channels) {
    if (picture != picture_ || needed.begin < there_.begin || needed.begin > there_.end) {
      picture_ = picture;
      there_ = {needed.begin, needed.begin};
    }
    while (there_.end < needed.end) {
      const Range next{there_.end, std::min(there_.end + rows_.at_once, rows_.h)};
      rows_.bring(rows_, picture, next, channels, memory_);
      there_ = {std::max(there_.begin, next.end - rows_.slots), next.end};
    }
  }

  /// The row that will be needed next, if it is brought alone: several together are short, and soon brought.
  Ahead ahead() const {
    if (rows_.at_once > 1 || there_.end >= rows_.h) return {};
    return rows_.ahead(picture_, there_.end);
  }

  /// Addresses in x of what is missing up to a row, counted over all pictures, where that is one piece.
  Range missing(int64_t last_row) const {
    if (rows_.nchw) return {0, 0};
    const int64_t row_bytes = rows_.w * rows_.c * rows_.x_element_bytes;
    const int64_t x = reinterpret_cast<int64_t>(rows_.x);
    return {x + (picture_ * rows_.h + there_.end) * row_bytes, x + (last_row + 1) * row_bytes};
  }

  const void* row(int64_t h) const { return memory_ + h % rows_.slots * rows_.row_bytes(); }

 private:
  const InputRows& rows_;
  char* memory_;
  int64_t picture_ = -1;
  Range there_{0, 0};
};

namespace detail {

/// What happens to values on the way. By far the most common are told apart when compiled: a row is little work else.
enum class OnTheWay { kNothing, kRelu, kPrologue };

/// One type's values of pixels and channels, brought as another's.
template <class T, class X, OnTheWay kWay>
class RowBringer {
 public:
  RowBringer(const InputRows& in, int64_t picture, Range channels, char* memory)
      : in_(in),
        from_(static_cast<const T*>(in.x) + picture * in.c * in.h * in.w),
        to_(reinterpret_cast<X*>(memory)),
        c_begin_(channels.begin),
        count_(channels.end - channels.begin) {}

  void bring(Range rows) const {
    if (in_.nchw) return turn(rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) copy(row);
  }

 private:
  X* pixel(int64_t row, int64_t column) const {
    return to_ + row % in_.slots * in_.row_elements() + (in_.left + column) * in_.pixel_step;
  }

  static XSEP_INLINE Vec loaded(const T* p, int64_t lanes) {
    if constexpr (kWay == OnTheWay::kNothing) return incomplete(lanes) ? load_first_bits(p, lanes) : load_bits(p);
    return load_lanes(p, lanes);
  }
  static XSEP_INLINE void stored(X* p, Vec v, int64_t lanes) {
    if constexpr (kWay == OnTheWay::kNothing)
      return incomplete(lanes) ? store_first_bits(p, v, lanes) : store_bits(p, v);
    store_lanes(p, v, lanes);
  }
  template <int N>
  XSEP_INLINE void apply_prologue(int64_t c, Vec (&v)[N]) const {
    if constexpr (kWay == OnTheWay::kPrologue) apply(in_.prologue, c_begin_ + c, v);
    if constexpr (kWay == OnTheWay::kRelu) {
      XSEP_UNROLL
      for (int i = 0; i < N; ++i) v[i] = relu(v[i]);
    }
  }

  void copy(int64_t row) const {
    constexpr int kAtOnce = 4;  // pixels that share the vectors of the prologue
    const T* from = from_ + row * in_.w * in_.c + c_begin_;
    const auto take = [&](int64_t column, auto pixels) __attribute__((always_inline)) {
      constexpr int kPixels = pixels();
      const T* at = from + column * in_.c;
      X* to = pixel(row, column);
      for (int64_t c = 0; c < count_; c += kLanes) {
        const int64_t lanes = std::min<int64_t>(kLanes, count_ - c);
        Vec v[kPixels];
        XSEP_UNROLL
        for (int i = 0; i < kPixels; ++i) v[i] = loaded(at + i * in_.c + c, lanes);
        apply_prologue(c, v);
        XSEP_UNROLL
        for (int i = 0; i < kPixels; ++i) stored(to + i * in_.pixel_step + c, v[i], lanes);
      }
    };
    int64_t column = 0;
    for (; column + kAtOnce <= in_.w; column += kAtOnce) take(column, std::integral_constant<int, kAtOnce>{});
    for (; column < in_.w; ++column) take(column, std::integral_constant<int, 1>{});
  }

  /// Squares through registers. Rows follow each other in a plane, so squares may begin in one and end in the next;
  /// the last square of pixels or channels begins so early that it is whole, where there are enough of them.
  void turn(Range rows) const {
    const int64_t pixels = (rows.end - rows.begin) * in_.w;
    const int64_t whole = std::max<int64_t>(pixels - kLanes, 0);
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const int64_t first = std::min(i, whole);
      X* to[kLanes];
      int64_t row = rows.begin + first / in_.w, column = first % in_.w;
      const int64_t n = std::min<int64_t>(kLanes, pixels);
      X* next = pixel(row, column);
      for (int64_t l = 0; l < n; ++l, next += in_.pixel_step) {
        to[l] = next;
        if (++column < in_.w) continue;
        column = 0;
        next = pixel(++row, 0) - in_.pixel_step;
      }
      turn_squares(from_ + c_begin_ * in_.h * in_.w + rows.begin * in_.w + first, to, n);
    }
  }

  void turn_squares(const T* from, X* const (&to)[kLanes], int64_t pixels) const {
    const int64_t plane = in_.h * in_.w;
    const int64_t whole = std::max<int64_t>(count_ - kLanes, 0);
    if (pixels == kLanes && count_ >= kLanes) {
      for (int64_t i = 0; i < count_; i += kLanes) {
        const int64_t c = std::min(i, whole);
        Vec v[kLanes];
        XSEP_UNROLL
        for (int l = 0; l < kLanes; ++l) {
          const T* at = from + (c + l) * plane;
          // Too many planes for the hardware to follow: what is read two lines later is asked for here.
          __builtin_prefetch(at + 128 / sizeof(T), 0, 2);
          v[l] = loaded(at, kLanes);
        }
        transpose(v);
        apply_prologue(c, v);
        XSEP_UNROLL
        for (int l = 0; l < kLanes; ++l) stored(to[l] + c, v[l], kLanes);
      }
      return;
    }
    for (int64_t i = 0; i < count_; i += kLanes) {
      const int64_t c = std::min(i, whole);
      const int64_t channels = std::min<int64_t>(kLanes, count_);
      Vec v[kLanes] = {};
      for (int64_t l = 0; l < channels; ++l) v[l] = loaded(from + (c + l) * plane, pixels);
      transpose(v);
      apply_prologue(c, v);
      for (int64_t l = 0; l < pixels; ++l) stored(to[l] + c, v[l], channels);
    }
  }

  const InputRows& in_;
  const T* from_;  // the picture
  X* to_;
  int64_t c_begin_, count_;
};

}  // namespace detail

/// InputRows::Bring of an x of type T for kernels that read X.
template <class T, class X>
void bring_rows(const InputRows& in, int64_t picture, Range rows, Range channels, char* memory) {
  using detail::OnTheWay;
  const auto bring = [&]<OnTheWay kWay>() {
    detail::RowBringer<T, X, kWay>(in, picture, channels, memory).bring(rows);
  };
  const ChannelAffine& a = in.prologue;
  if constexpr (std::is_same_v<T, X>) {
    if (a.is_identity()) return bring.template operator()<OnTheWay::kNothing>();
    if (!a.scale && !a.shift && a.activation == Activation::kRelu) return bring.template operator()<OnTheWay::kRelu>();
  }
  bring.template operator()<OnTheWay::kPrologue>();
}

}  // namespace xsep::cpu
