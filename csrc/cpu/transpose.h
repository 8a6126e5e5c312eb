// Transposition through registers: of weights into panels, and between NCHW and NHWC.
#pragma once

#include <algorithm>

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

/// A square of kLanes x kLanes: in each step, the off-diagonal halves of blocks twice as small change places.
XSEP_INLINE void transpose(Vec (&v)[kLanes]) {
  constexpr int kSteps = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
  static_assert(1 << kSteps == kLanes);
  unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
    constexpr int half = kLanes >> (step() + 1);
    VecInt low{};
    VecInt high{};
    for (int l = 0; l < kLanes; ++l) {
      low[l] = l & half ? kLanes + l - half : l;
      high[l] = l & half ? kLanes + l : l + half;
    }
    unroll<kLanes>([&](auto i) __attribute__((always_inline)) {
      if constexpr ((i() & half) == 0) {
        const Vec a = v[i];
        const Vec b = v[i + half];
        v[i] = shuffle(a, b, low);
        v[i + half] = shuffle(a, b, high);
      }
    });
  });
}

/// Values moved as they are, not as numbers.
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

/// to [columns, rows] = from [rows, columns]; steps in elements between rows.
template <class T>
void transpose_matrix(const T* from, int64_t rows, int64_t columns, int64_t from_step, T* to, int64_t to_step) {
  const int64_t whole_rows = rows - rows % kLanes;
  const int64_t whole_columns = columns - columns % kLanes;
  for (int64_t j = 0; j < whole_columns; j += kLanes) {
    for (int64_t i = 0; i < whole_rows; i += kLanes) {
      Vec v[kLanes];
      unroll<kLanes>([&](auto l) __attribute__((always_inline)) { v[l] = load_bits(from + (i + l) * from_step + j); });
      transpose(v);
      unroll<kLanes>([&](auto l) __attribute__((always_inline)) { store_bits(to + (j + l) * to_step + i, v[l]); });
    }
    for (int64_t i = whole_rows; i < rows; ++i) {
      for (int64_t l = 0; l < kLanes; ++l) to[(j + l) * to_step + i] = from[i * from_step + j + l];
    }
  }
  for (int64_t j = whole_columns; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * to_step + i] = from[i * from_step + j];
  }
}

}  // namespace xsep::cpu
