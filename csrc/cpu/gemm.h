// Matrix products of blocks that lie in the caches: what the pointwise convolution and its gradients are made of.
//
// Elements are 32 bits wide: one float, or two neighbours in depth of BFloat16 ("pairs"), which AVX512_BF16 multiplies
// and adds in one instruction. So both forms are one code, and strides count in elements of 32 bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/geometry.h"
#include "vec.h"

namespace xsep::cpu {

/// c [m, n] = a [m, depth] * b [depth, n], or added to what c holds.
struct Product {
  const void* a;  // row i, depth k at i * a_row + k * a_step, or as a_block says
  int64_t a_row, a_step;
  const void* b;  // depth k, column j at k * b_step + j; whole vectors are read
  int64_t b_step;
  float* c;  // row i, column j at i * c_row + j; whole vectors are written
  int64_t c_row;
  int64_t depth;
  bool add;
  int64_t a_block = 0;         // from kProductRows rows to the next so many, where these are not rows like others
  const char* next = nullptr;  // fetched towards the second-level cache, next_step bytes a step in depth: see Soon
  int64_t next_step = 0;
};

/// Memory that is read once products are made, in up to two pieces. It is fetched meanwhile, when memory has else
/// little to do: a line a step in depth, the first piece first.
struct Soon {
  static constexpr int64_t kLine = 64;

  const char* at = nullptr;
  int64_t bytes = 0;
  const char* then = nullptr;
  int64_t then_bytes = 0;
  int64_t wait = 0;  // lines of steps that fetch nothing yet

  /// As late as so many steps allow, when less of what the products read will be read again.
  void late(int64_t steps) { wait = steps - (bytes + then_bytes) / kLine; }

  /// Has p fetch the next part.
  void give(Product& p) {
    if (bytes <= 0) at = then, bytes = then_bytes, then_bytes = 0;
    const bool now = bytes > 0 && wait <= 0;
    p.next = now ? at : static_cast<const char*>(p.b);
    p.next_step = now ? kLine : 0;
    if (!now) {
      wait -= p.depth;
      return;
    }
    at += p.depth * kLine;
    bytes -= p.depth * kLine;
  }
};

/// Rows and vectors of a block kept in registers: with what is loaded they take 29 of 32, or 15 of 16.
constexpr int kProductRows = 6;
constexpr int kProductVectors = kRegisters == 32 ? 4 : 2;

namespace detail {

XSEP_INLINE Vec broadcast_element(const void* p) { return broadcast(*static_cast<const float*>(p)); }

/// sum += a * b for a block in registers, one product after the other.
template <bool kPairs, int kRows, int kVectors>
XSEP_INLINE void accumulate(const Product& p, Vec (&sum)[kRows][kVectors]) {
  typedef VecBits BitsUnaligned __attribute__((aligned(4), may_alias));
  const auto* a = static_cast<const uint32_t*>(p.a);
  const auto* b = static_cast<const uint32_t*>(p.b);
  const int64_t a_row = p.a_row;
  const char* next = p.next;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_step, next += p.next_step) {
    __builtin_prefetch(next, 0, 2);
    VecBits w[kVectors];
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) w[j] = *reinterpret_cast<const BitsUnaligned*>(b + j * kLanes);
    XSEP_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const VecBits v = broadcast_bits(a[i * a_row]);
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (kPairs) {
#if defined(__AVX512F__)
          sum[i][j] = dot_pairs(sum[i][j], v, w[j]);
#endif
        } else {
          sum[i][j] = fma(as_float(v), as_float(w[j]), sum[i][j]);
        }
      }
    }
  }
}

/// Products added to one sum of float in a row: an error grows with the length of its sum.
constexpr int64_t kSumDepth = 256;

/// sum = a * b as a sum of shorter sums. On its own, so that it takes no registers from accumulate's loop.
template <bool kPairs, int kRows, int kVectors>
XSEP_NOINLINE void accumulate_in_parts(Product p, Vec (&sum)[kRows][kVectors]) {
  for (int64_t left = p.depth; left > 0; left -= kSumDepth) {
    p.depth = std::min(left, kSumDepth);
    Vec part[kRows][kVectors];
    set_zero(part);
    accumulate<kPairs>(p, part);
    XSEP_UNROLL
    for (int i = 0; i < kRows; ++i) {
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[i][j] = sum[i][j] + part[i][j];
    }
    p.a = static_cast<const uint32_t*>(p.a) + p.depth * p.a_step;
    p.b = static_cast<const uint32_t*>(p.b) + p.depth * p.b_step;
    p.next += p.depth * p.next_step;
  }
}

/// sum = a * b for a block in registers.
template <bool kPairs, int kRows, int kVectors>
XSEP_INLINE void multiply_in_registers(const Product& p, Vec (&sum)[kRows][kVectors]) {
  // Rounding to BFloat16 outweighs what a long sum of float loses.
  if (kPairs || p.depth <= kSumDepth) return accumulate<kPairs>(p, sum);
  Vec whole[kRows][kVectors];
  set_zero(whole);
  accumulate_in_parts<kPairs>(p, whole);
  XSEP_UNROLL
  for (int i = 0; i < kRows; ++i) {
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[i][j] = whole[i][j];
  }
}

template <bool kPairs, int kRows, int kVectors>
void multiply_block(const Product& p) {
  Vec sum[kRows][kVectors];
  set_zero(sum);
  if (p.add) {
    XSEP_UNROLL
    for (int i = 0; i < kRows; ++i) {
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) __builtin_prefetch(p.c + i * p.c_row + j * kLanes, 1, 2);
    }
  }
  multiply_in_registers<kPairs>(p, sum);
  XSEP_UNROLL
  for (int i = 0; i < kRows; ++i) {
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      float* c = p.c + i * p.c_row + j * kLanes;
      // Sums of blocks are added up, not single products: a long sum loses less that way.
      store(c, p.add ? load(c) + sum[i][j] : sum[i][j]);
    }
  }
}

/// f(integral_constant rows) for rows in [1, kProductRows].
template <class F>
XSEP_INLINE void with_rows(int64_t rows, F&& f) {
  static_assert(kProductRows == 6);
  switch (rows) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    default:
      return f(std::integral_constant<int, 6>{});
  }
}

/// f(integral_constant vectors) for as many vectors as a block takes of those that are left.
template <class F>
XSEP_INLINE void with_vectors(int64_t left, F&& f) {
  if (left >= kProductVectors) {
    f(std::integral_constant<int, kProductVectors>{});
  } else if (left >= 2) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace detail

/// The whole product, and meanwhile as much of what is read soon as its steps allow. n is taken in whole vectors.
template <bool kPairs>
void multiply(Product p, int64_t m, int64_t n, Soon& soon) {
  const auto* a = static_cast<const uint32_t*>(p.a);
  const auto* b = static_cast<const uint32_t*>(p.b);
  float* c = p.c;
  const int64_t a_block = p.a_block ? p.a_block : kProductRows * p.a_row;
  const int64_t all_vectors = (n + kLanes - 1) / kLanes;
  int64_t j = 0;
  while (j < all_vectors) {
    p.b = b + j * kLanes;
    detail::with_vectors(all_vectors - j, [&](auto vectors) __attribute__((always_inline)) {
      for (int64_t i = 0; i < m; i += kProductRows) {
        p.a = a + i / kProductRows * a_block;
        p.c = c + i * p.c_row + j * kLanes;
        soon.give(p);
        detail::with_rows(std::min<int64_t>(m - i, kProductRows), [&](auto rows) __attribute__((always_inline)) {
          detail::multiply_block<kPairs, rows(), vectors()>(p);
        });
      }
      j += vectors();
    });
  }
}

/// Where values of a left side go for multiply to find a block's together, [blocks, depth, kProductRows]: in a row they
/// are a line apart, and of rows many powers of two apart few stay in the first-level cache.
struct LeftBlocks {
  float* data;
  int64_t m, depth;

  static int64_t size(int64_t m, int64_t depth) { return round_up(m, kProductRows) * depth; }
  void give(Product& p) const { p.a = data, p.a_row = 1, p.a_step = kProductRows, p.a_block = kProductRows * depth; }

  /// Depths [k, k + count), each m values, step apart.
  void put(const float* from, int64_t step, int64_t k, int64_t count) const {
    for (int64_t i = 0; i < m; i += kProductRows) {
      float* to = data + i * depth + k * kProductRows;
      const auto rows = static_cast<size_t>(std::min<int64_t>(m - i, kProductRows));
      for (int64_t l = 0; l < count; ++l, to += kProductRows) {
        const float* at = from + l * step + i;
        if (rows == kProductRows) {
          std::memcpy(to, at, kProductRows * sizeof(float));
        } else {
          std::memcpy(to, at, rows * sizeof(float));
        }
      }
    }
  }
};

}  // namespace xsep::cpu
