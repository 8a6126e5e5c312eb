// The pointwise convolution of pixels whose C_mid values lie in the caches: panels of output channels, epilogue and
// store.
#pragma once

#include <algorithm>

#include "../common/cpu_plan.h"
#include "activate.h"
#include "gemm.h"
#include "planes.h"

namespace xsep::cpu {

/// y = epilogue(z w + residual). z comes with each call; its elements are float, or BFloat16 in pairs.
struct Pointwise {
  int64_t c_out;
  int64_t depth;           // C_mid, rounded up to even for BFloat16
  bool pairs;              // z and w are BFloat16
  int64_t z_stride;        // elements between rows of z
  const void* w_packed;    // [panels, depth, kPanelColumns], or [panels, depth / 2, kPanelColumns, 2]
  ChannelAffine epilogue;  // scale and shift [panels * kPanelColumns]
  const void* residual;    // T [pixels, c_out], may be null
  void* y;                 // T [pixels, c_out], or [n, c_out, plane] where plane is not 0
  int64_t plane;           // P * Q of an NCHW output, else 0

  int64_t z_bytes() const { return pairs ? 2 : 4; }
  int64_t panel_bytes() const { return depth * kPanelColumns * z_bytes(); }
  const char* panel(int64_t i) const { return static_cast<const char*>(w_packed) + i * panel_bytes(); }
};

namespace detail {

constexpr int kEpilogueVectors = 4;
constexpr int64_t kEpilogueColumns = kEpilogueVectors * kLanes;
static_assert(kPanelColumns % kEpilogueColumns == 0);

/// y and residual at [0, columns) of one pixel from a row of products; n0 is the first column's channel.
template <class T>
void finish_row(const Pointwise& p, const float* products, int64_t n0, int64_t columns, const T* residual, T* y) {
  for (int64_t j = 0; j < columns; j += kEpilogueColumns) {
    Vec v[kEpilogueVectors];
    XSEP_UNROLL
    for (int i = 0; i < kEpilogueVectors; ++i) v[i] = load(products + j + i * kLanes);
    // One vector of scale and shift for each vector of products: these are different channels, not different pixels.
    const ChannelAffine& e = p.epilogue;
    XSEP_UNROLL
    for (int i = 0; i < kEpilogueVectors; ++i) {
      const int64_t at = j + i * kLanes;
      if (e.scale) v[i] = v[i] * load(e.scale + n0 + at);
      if (e.shift) v[i] = v[i] + load(e.shift + n0 + at);
      if (residual && at < columns) v[i] = v[i] + load_first(residual + at, std::min<int64_t>(kLanes, columns - at));
    }
    activate(v, e.activation, e.alpha);
    XSEP_UNROLL
    for (int i = 0; i < kEpilogueVectors; ++i) {
      const int64_t at = j + i * kLanes;
      if (at + kLanes <= columns) {
        store(y + at, v[i]);
      } else if (at < columns) {
        store_first(y + at, v[i], columns - at);
      }
    }
  }
}

/// Where a panel's results go: pixel i, column j at out[i * step + j].
template <class T>
struct PanelOutput {
  T* out;
  int64_t step;
};

/// From products [rows, kPanelColumns]: any number of columns, any epilogue. pixel is the first row's.
template <class T>
void finish_rows(const Pointwise& p, const float* products, int64_t rows, int64_t n0, int64_t columns, int64_t pixel,
                 PanelOutput<T> y) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + (pixel + i) * p.c_out + n0 : nullptr;
    finish_row(p, products + i * kPanelColumns, n0, columns, residual, y.out + i * y.step);
  }
}

/// The same from registers: all rows of a block, the last vector of columns perhaps in part, no residual, and no
/// activation or ReLU.
template <class T, bool kPairs, int kVectors>
void multiply_and_finish(const Pointwise& p, const Product& product, int64_t n0, int64_t columns, PanelOutput<T> y) {
  constexpr int kRows = kProductRows;
  Vec sum[kRows][kVectors];
  set_zero(sum);
  multiply_in_registers<kPairs>(product, sum);
  const ChannelAffine& e = p.epilogue;
  const bool rectified = e.activation == Activation::kRelu;
  XSEP_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    if (e.scale) {
      const Vec scale = load(e.scale + n0 + j * kLanes);
      XSEP_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i][j] = sum[i][j] * scale;
    }
    if (e.shift) {
      const Vec shift = load(e.shift + n0 + j * kLanes);
      XSEP_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i][j] = sum[i][j] + shift;
    }
    if (rectified) {
      XSEP_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i][j] = relu(sum[i][j]);
    }
    const int64_t lanes = columns - j * kLanes;
    if (j + 1 == kVectors && lanes < kLanes) {
      XSEP_UNROLL
      for (int i = 0; i < kRows; ++i) store_first(y.out + i * y.step + j * kLanes, sum[i][j], lanes);
    } else {
      XSEP_UNROLL
      for (int i = 0; i < kRows; ++i) store(y.out + i * y.step + j * kLanes, sum[i][j]);
    }
  }
}

/// One panel of y for m pixels of a tile by our own kernel.
template <class T, bool kPairs>
void multiply_panel(const Pointwise& p, const void* z, const void* w, Soon soon, int64_t m, int64_t pixel, int64_t n0,
                    float* products, PanelOutput<T> y) {
  static_assert(kPanelColumns % (kProductVectors * kLanes) == 0);
  constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t columns = std::min(kPanelColumns, p.c_out - n0);
  const ChannelAffine& e = p.epilogue;
  const bool in_registers = !p.residual && (e.activation == Activation::kIdentity || e.activation == Activation::kRelu);
  const int64_t z_stride = kPairs ? p.z_stride / 2 : p.z_stride;
  const int64_t depth = kPairs ? p.depth / 2 : p.depth;
  Product product{z, z_stride, 1, w, kPanelColumns, products, kPanelColumns, depth, false};
  for (int64_t row = 0; row < m; row += kProductRows) {
    const int64_t rows = std::min<int64_t>(kProductRows, m - row);
    T* out = y.out + row * y.step;
    // The lines of y that are written to arrive while the products are made.
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += kLineElements) __builtin_prefetch(out + i * y.step + j, 1, 2);
    }
    product.a = static_cast<const uint32_t*>(z) + row * z_stride;
    int64_t done = 0;
    while (in_registers && rows == kProductRows && done < columns) {
      product.b = static_cast<const uint32_t*>(w) + done;
      soon.give(product);
      with_vectors(ceil_div(columns - done, kLanes), [&](auto vectors) __attribute__((always_inline)) {
        const int64_t some = std::min<int64_t>(columns - done, vectors() * kLanes);
        multiply_and_finish<T, kPairs, vectors()>(p, product, n0 + done, some, {out + done, y.step});
        done += some;
      });
    }
    if (done == columns) continue;
    product.b = static_cast<const uint32_t*>(w) + done;
    multiply<kPairs>(product, rows, columns - done, soon);
    finish_rows<T>(p, products, rows, n0 + done, columns - done, pixel + row, {out + done, y.step});
  }
}

/// m pixels of one panel, [m, columns] step elements apart, to their places in an NCHW y.
template <class T>
void store_planes(const Pointwise& p, const T* from, int64_t step, int64_t m, int64_t pixel, int64_t n0,
                  int64_t columns) {
  const Planes<T> y{static_cast<T*>(p.y), p.c_out, p.plane};
  pixels_to_planes(from, step, y, {pixel, pixel + m}, {n0, n0 + columns});
}

}  // namespace detail

/// Bytes of memory for what multiply_panel makes of m pixels.
inline int64_t products_bytes(const Pointwise& p, int64_t m) {
  return (kProductRows + (p.plane ? m : 0)) * kPanelColumns * static_cast<int64_t>(sizeof(float));
}

/// One panel of y for m pixels by our own kernel, pairs in BFloat16 only: z is their first row, w the panel's packed
/// weights, scratch products_bytes; soon is what is read next.
template <class T>
void multiply_panel(const Pointwise& p, const void* z, const void* w, const Soon& soon, int64_t panel, int64_t m,
                    int64_t pixel, float* scratch) {
  const int64_t n0 = panel * kPanelColumns;
  T* tile = reinterpret_cast<T*>(scratch + kProductRows * kPanelColumns);
  detail::PanelOutput<T> y{static_cast<T*>(p.y) + pixel * p.c_out + n0, p.c_out};
  if (p.plane) y = {tile, kPanelColumns};
  if (!p.pairs) {
    detail::multiply_panel<T, false>(p, z, w, soon, m, pixel, n0, scratch, y);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    detail::multiply_panel<T, true>(p, z, w, soon, m, pixel, n0, scratch, y);
  }
  if (p.plane) detail::store_planes(p, tile, kPanelColumns, m, pixel, n0, std::min(kPanelColumns, p.c_out - n0));
}

/// The same from products [m, kPanelColumns] that are there already.
template <class T>
void finish_panel(const Pointwise& p, float* products, int64_t panel, int64_t m, int64_t pixel) {
  const int64_t n0 = panel * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, p.c_out - n0);
  if (!p.plane) {
    return detail::finish_rows<T>(p, products, m, n0, columns, pixel,
                                  {static_cast<T*>(p.y) + pixel * p.c_out + n0, p.c_out});
  }
  // In place: a row of T is no longer than its products, and its step is theirs.
  constexpr int64_t kStep = kPanelColumns * static_cast<int64_t>(sizeof(float) / sizeof(T));
  T* tile = reinterpret_cast<T*>(products);
  T row[kPanelColumns];
  for (int64_t i = 0; i < m; ++i) {
    detail::finish_rows<T>(p, products + i * kPanelColumns, 1, n0, columns, pixel + i, {row, kPanelColumns});
    std::copy(row, row + columns, tile + i * kStep);
  }
  detail::store_planes(p, tile, kStep, m, pixel, n0, columns);
}

}  // namespace xsep::cpu
