// Fused separable forward: a tile of z made by the depthwise kernel stays in the second-level cache and is multiplied
// there by panels of the pointwise weights.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/cpu_plan.h"
#include "depthwise_fprop.h"
#include "pointwise.h"

namespace xsep::cpu {

/// c [m, n] = a [m, k] * b [k, n] in BFloat16 with row strides lda, ldb, ldc, in elements; b's rows are interleaved in
/// pairs ([k / 2, ldb, 2]).
using TileGemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const void* a,
                          const void* b, float* c);

struct SeparableFprop {
  DepthwiseFprop depthwise;  // its output affine is the middle
  CpuTilePlan plan;
  Pointwise pointwise;
  TileGemm gemm;  // multiplies whole tiles; null: our own kernel does, block by block

  int64_t tile_bytes() const { return round_up(plan.tile_pixels * pointwise.z_stride * pointwise.z_bytes(), 64); }
  int64_t products_bytes() const {
    if (!gemm) return cpu::products_bytes(pointwise, plan.tile_pixels);
    return plan.tile_pixels * kPanelColumns * static_cast<int64_t>(sizeof(float));
  }
  /// What one thread needs: its z tile, products and rows of the input.
  int64_t scratch_bytes() const { return tile_bytes() + round_up(products_bytes(), 64) + depthwise.input.bytes(); }
  RowWindow window(void* scratch) const {
    return {depthwise.input, static_cast<char*>(scratch) + tile_bytes() + round_up(products_bytes(), 64)};
  }
};

/// z of some pixels, one row of p.pointwise.z_stride elements each. X is the type of the depthwise stage's input.
template <class X>
void make_z(const SeparableFprop& p, Range pixels, RowWindow& window, char* z) {
  const DepthwiseShape& shape = p.depthwise.shape;
  const Pointwise& pw = p.pointwise;
  const Storage storage = pw.pairs ? Storage::kBFloat16 : Storage::kFloat;
  depthwise_fprop_run<X>(p.depthwise, pixels, {0, shape.c}, {z, pw.z_stride, storage, 0}, window);
  if (pw.depth == shape.c * shape.multiplier) return;
  for (int64_t i = 0; i < pixels.end - pixels.begin; ++i) {
    std::memset(z + (i * pw.z_stride + pw.depth - 1) * pw.z_bytes(), 0, pw.z_bytes());
  }
}

namespace detail {

/// One panel of y for m pixels from `pixel` on; z is their first row, w the panel's packed weights, soon what is read
/// next.
template <class T>
void multiply_tile(const SeparableFprop& p, const char* z, const void* w, const Soon& soon, int64_t panel, int64_t m,
                   int64_t pixel, float* products) {
  const Pointwise& pw = p.pointwise;
  if (!p.gemm) return multiply_panel<T>(pw, z, w, soon, panel, m, pixel, products);
  const int64_t columns = round_up(std::min(kPanelColumns, pw.c_out - panel * kPanelColumns), 16);
  p.gemm(m, columns, pw.depth, pw.z_stride, kPanelColumns, kPanelColumns, z, w, products);
  finish_panel<T>(pw, products, panel, m, pixel);
}

/// What the tile after the one of these pixels will be the first to read of x.
inline Soon input_of_next_tile(const SeparableFprop& p, Range pixels, const RowWindow& window) {
  const int64_t end = std::min(pixels.end + p.plan.tile_pixels, p.plan.pixels);
  const Range memory = input_of_next_run(p.depthwise, {pixels.end, end}, window);
  return {reinterpret_cast<const char*>(memory.begin), memory.end - memory.begin};
}

}  // namespace detail

/// Task `task` of a p.plan that makes z tile by tile. Tasks of one group of panels follow each other, so that a
/// thread's panels stay in its cache. X is the depthwise stage's input type, T that of residual and y: they differ
/// where a prologue's results are kept in float. window is one that p gave for this scratch.
template <class X, class T>
void separable_fprop_task(const SeparableFprop& p, int64_t task, RowWindow& window, void* scratch) {
  const Range panels = p.plan.group_panels(task / p.plan.tiles);
  const Range pixels = p.plan.tile(task % p.plan.tiles);
  char* z = static_cast<char*>(scratch);
  float* products = reinterpret_cast<float*>(z + p.tile_bytes());
  make_z<X>(p, pixels, window, z);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const void* w = p.pointwise.panel(panel);
    const Soon soon = panel + 1 < panels.end ? Soon{p.pointwise.panel(panel + 1), p.pointwise.panel_bytes()}
                                             : detail::input_of_next_tile(p, pixels, window);
    detail::multiply_tile<T>(p, z, w, soon, panel, pixels.end - pixels.begin, pixels.begin, products);
  }
}

/// Task `panel` of a p.plan that makes all of z first: w is the panel's packed weights, next the weights of the panel
/// to be packed after it.
template <class T>
void multiply_all_tiles(const SeparableFprop& p, int64_t panel, const char* z, const void* w, const Soon& next,
                        float* products) {
  for (int64_t i = 0; i < p.plan.tiles; ++i) {
    const Range pixels = p.plan.tile(i);
    const char* from = z + pixels.begin * p.pointwise.z_stride * p.pointwise.z_bytes();
    const Soon soon = i + 1 == p.plan.tiles ? next : Soon{};
    detail::multiply_tile<T>(p, from, w, soon, panel, pixels.end - pixels.begin, pixels.begin, products);
  }
}

}  // namespace xsep::cpu
