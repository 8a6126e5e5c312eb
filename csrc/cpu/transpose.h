// Transposition through registers: of weights into panels, and between NCHW and NHWC.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace xsep::cpu {

/// r[l] = a[index[l]], or b[index[l] - kLanes].
XSEP_INLINE Vec shuffle(Vec a, Vec b, VecInt index) {
#if defined(__clang__)
  Vec r;
  for (int l = 0; l < kLanes; ++l) r[l] = index[l] < kLanes ? a[index[l]] : b[index[l] - kLanes];
  return r;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

/// The off-diagonal halves of blocks of 2 kHalf x 2 kHalf change places; then those of blocks half as large, to the
/// last.
template <int kHalf>
XSEP_INLINE void transpose_blocks(Vec (&v)[kLanes]) {
  VecInt low{};
  VecInt high{};
  for (int l = 0; l < kLanes; ++l) {
    low[l] = l & kHalf ? kLanes + l - kHalf : l;
    high[l] = l & kHalf ? kLanes + l : l + kHalf;
  }
  XSEP_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (i & kHalf) continue;
    const Vec a = v[i];
    const Vec b = v[i + kHalf];
    v[i] = shuffle(a, b, low);
    v[i + kHalf] = shuffle(a, b, high);
  }
  if constexpr (kHalf > 1) transpose_blocks<kHalf / 2>(v);
}

/// A square of kLanes x kLanes.
XSEP_INLINE void transpose(Vec (&v)[kLanes]) { transpose_blocks<kLanes / 2>(v); }

/// Values moved as they are, not as numbers: see Moved.
XSEP_INLINE Vec load_bits(const float* p) { return load(p); }
XSEP_INLINE Vec load_first_bits(const float* p, int64_t n) { return load_first(p, n); }
XSEP_INLINE void store_bits(float* p, Vec v) { store(p, v); }
XSEP_INLINE void store_first_bits(float* p, Vec v, int64_t n) { store_first(p, v, n); }
template <class T>
XSEP_INLINE Vec load_bits(const T* p) {
  static_assert(sizeof(T) == 2);
  return as_float(__builtin_convertvector(*reinterpret_cast<const Vec16Unaligned*>(p), VecBits));
}
template <class T>
XSEP_INLINE Vec load_first_bits(const T* p, int64_t n) {
  static_assert(sizeof(T) == 2);
  return as_float(__builtin_convertvector(load_first_16(p, n), VecBits));
}
template <class T>
XSEP_INLINE void store_first_bits(T* p, Vec v, int64_t n) {
  static_assert(sizeof(T) == 2);
  store_first_16(p, __builtin_convertvector(as_bits(v), Vec16), n);
}
template <class T>
XSEP_INLINE void store_bits(T* p, Vec v) {
  static_assert(sizeof(T) == 2);
  *reinterpret_cast<Vec16Unaligned*>(p) = __builtin_convertvector(as_bits(v), Vec16);
}

/// How values come to registers and go from there, when To is what they become: T itself, or float.
template <class T, class To>
struct Moved {
  static constexpr bool kSame = std::is_same_v<T, To>;
  static_assert(kSame || std::is_same_v<To, float>);

  static XSEP_INLINE Vec load(const T* p) {
    if constexpr (kSame) return load_bits(p);
    return cpu::load(p);
  }
  static XSEP_INLINE Vec load_first(const T* p, int64_t n) {
    if constexpr (kSame) return load_first_bits(p, n);
    return cpu::load_first(p, n);
  }
};

namespace detail {

/// to [kLanes, kLanes] = from, turned round. The squares that are whole have registers of their own: an array that is
/// also indexed by a variable would lie in memory, which takes four times as long.
template <bool kFetch, class To, class T>
XSEP_INLINE void transpose_square(const T* from, int64_t from_step, To* to, int64_t to_step) {
  Vec v[kLanes];
  XSEP_UNROLL
  for (int l = 0; l < kLanes; ++l) {
    if constexpr (kFetch) __builtin_prefetch(from + l * from_step + 128 / sizeof(T), 0, 2);
    v[l] = Moved<T, To>::load(from + l * from_step);
  }
  transpose(v);
  XSEP_UNROLL
  for (int l = 0; l < kLanes; ++l) store_bits(to + l * to_step, v[l]);
}

/// The same of [rows, columns], at most kLanes each.
template <class To, class T>
void transpose_part(const T* from, int64_t rows, int64_t columns, int64_t from_step, To* to, int64_t to_step) {
  Vec v[kLanes] = {};
  for (int64_t l = 0; l < rows; ++l) v[l] = Moved<T, To>::load_first(from + l * from_step, columns);
  transpose(v);
  for (int64_t l = 0; l < columns; ++l) store_first_bits(to + l * to_step, v[l], rows);
}

}  // namespace detail

/// to [columns, rows] = from [rows, columns]; steps in elements between rows. Squares through registers: the last ones
/// begin so early that they are whole, where there is enough. kFetch: rows of `from` are too far apart for the hardware
/// to follow, and what is read two lines later is asked for.
template <bool kFetch = false, class T, class To>
void transpose_matrix(const T* from, int64_t rows, int64_t columns, int64_t from_step, To* to, int64_t to_step) {
  const bool whole = rows >= kLanes && columns >= kLanes;
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      if (whole) {
        const int64_t row = std::min(i, rows - kLanes), column = std::min(j, columns - kLanes);
        detail::transpose_square<kFetch>(from + row * from_step + column, from_step, to + column * to_step + row,
                                         to_step);
      } else {
        detail::transpose_part(from + i * from_step + j, std::min<int64_t>(kLanes, rows - i),
                               std::min<int64_t>(kLanes, columns - j), from_step, to + j * to_step + i, to_step);
      }
    }
  }
}

}  // namespace xsep::cpu
