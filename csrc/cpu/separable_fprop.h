// Fused separable forward: a tile of z made by the depthwise kernel stays in the second-level cache and is multiplied
// there by panels of the pointwise weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/cpu_plan.h"
#include "activate.h"
#include "depthwise_fprop.h"

namespace xsep::cpu {

/// c [m, n] = a [m, k] * b [k, n] with row strides lda, ldb, ldc, in elements. a and b are both float, or both BFloat16
/// with b's rows interleaved in pairs ([k / 2, ldb, 2]).
using Gemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const void* a,
                      const void* b, float* c);

struct SeparableFprop {
  DepthwiseFprop depthwise;  // its output affine is the middle
  CpuSeparablePlan plan;
  int64_t c_out;
  int64_t depth;           // C_mid, rounded up to even for BFloat16
  Storage z_storage;       // kFloat or kBFloat16
  int64_t z_stride;        // elements between rows of the z tile
  const void* w_packed;    // z's type, [panels, depth, kPanelColumns], or [panels, depth / 2, kPanelColumns, 2]
  ChannelAffine epilogue;  // scale and shift [panels * kPanelColumns]
  const void* residual;    // T [pixels, c_out], may be null
  void* y;                 // T [pixels, c_out]
  Gemm gemm;

  int64_t z_bytes() const { return z_storage == Storage::kFloat ? 4 : 2; }
  int64_t tile_bytes() const { return round_up(plan.tile_pixels * z_stride * z_bytes(), 64); }
  /// What one task needs: its z tile and one panel of products.
  int64_t scratch_bytes() const {
    return tile_bytes() + plan.tile_pixels * kPanelColumns * static_cast<int64_t>(sizeof(float));
  }
};

namespace detail {

constexpr int kEpilogueVectors = 4;
constexpr int64_t kEpilogueColumns = kEpilogueVectors * kLanes;
static_assert(kPanelColumns % kEpilogueColumns == 0);

/// y and residual at [0, columns) of one pixel from a row of products; n0 is the first column's channel.
template <class T>
void finish_row(const SeparableFprop& p, const float* products, int64_t n0, int64_t columns, const T* residual, T* y) {
  for (int64_t j = 0; j < columns; j += kEpilogueColumns) {
    Vec v[kEpilogueVectors];
    unroll<kEpilogueVectors>([&](auto i) __attribute__((always_inline)) { v[i] = load(products + j + i * kLanes); });
    // One vector of scale and shift for each vector of products: these are different channels, not different pixels.
    const ChannelAffine& e = p.epilogue;
    unroll<kEpilogueVectors>([&](auto i) __attribute__((always_inline)) {
      const int64_t at = j + i * kLanes;
      if (e.scale) v[i] = v[i] * load(e.scale + n0 + at);
      if (e.shift) v[i] = v[i] + load(e.shift + n0 + at);
      if (residual && at < columns) v[i] = v[i] + load_first(residual + at, std::min<int64_t>(kLanes, columns - at));
    });
    activate(v, e.activation, e.alpha);
    unroll<kEpilogueVectors>([&](auto i) __attribute__((always_inline)) {
      const int64_t at = j + i * kLanes;
      if (at + kLanes <= columns) {
        store(y + at, v[i]);
      } else if (at < columns) {
        store_first(y + at, v[i], columns - at);
      }
    });
  }
}

}  // namespace detail

/// Task `task` of p.plan. Tasks of one group of panels follow each other, so that a thread's panels stay in its cache.
/// X is the depthwise stage's input type, T that of residual and y: they differ where a prologue was applied
/// beforehand.
template <class X, class T>
void separable_fprop_task(const SeparableFprop& p, int64_t task, void* scratch) {
  const DepthwiseShape& shape = p.depthwise.shape;
  const int64_t tile = task % p.plan.tiles;
  const Range panels = p.plan.group_panels(task / p.plan.tiles);
  const Range pixels{tile * p.plan.tile_pixels, std::min((tile + 1) * p.plan.tile_pixels, shape.pixels_out())};
  const int64_t m = pixels.end - pixels.begin;
  constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T));
  char* z = static_cast<char*>(scratch);
  float* products = reinterpret_cast<float*>(z + p.tile_bytes());

  for (int64_t pass = 0; pass < shape.multiplier; ++pass) {
    const RunOutput to{z + pass * shape.c * p.z_bytes(), p.z_stride, p.z_storage};
    depthwise_fprop_run<X>(p.depthwise, pass, pixels, to);
  }
  if (p.depth > shape.c * shape.multiplier) {
    for (int64_t i = 0; i < m; ++i) std::memset(z + (i * p.z_stride + p.depth - 1) * p.z_bytes(), 0, p.z_bytes());
  }
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t n0 = panel * kPanelColumns;
    const int64_t columns = std::min(kPanelColumns, p.c_out - n0);
    // The lines of y that this panel is written to arrive while the GEMM runs: its own memory is in the cache already.
    for (int64_t i = 0; i < m; ++i) {
      const T* at = static_cast<const T*>(p.y) + (pixels.begin + i) * p.c_out + n0;
      for (int64_t j = 0; j < columns; j += kLineElements) __builtin_prefetch(at + j, 1, 2);
    }
    const char* w = static_cast<const char*>(p.w_packed) + panel * p.depth * kPanelColumns * p.z_bytes();
    p.gemm(m, round_up(columns, 16), p.depth, p.z_stride, kPanelColumns, kPanelColumns, z, w, products);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t at = (pixels.begin + i) * p.c_out + n0;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
      detail::finish_row(p, products + i * kPanelColumns, n0, columns, residual, static_cast<T*>(p.y) + at);
    }
  }
}

}  // namespace xsep::cpu
