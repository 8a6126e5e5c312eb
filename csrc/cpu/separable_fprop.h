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
  CpuSeparablePlan plan;
  Pointwise pointwise;
  TileGemm gemm;  // multiplies whole tiles; null: our own kernel does, block by block

  int64_t tile_bytes() const { return round_up(plan.tile_pixels * pointwise.z_stride * pointwise.z_bytes(), 64); }
  /// Pixels whose products are in memory at a time.
  int64_t product_rows() const { return gemm ? plan.tile_pixels : kProductRows; }
  /// What one task needs: its z tile and products.
  int64_t scratch_bytes() const {
    return tile_bytes() + product_rows() * kPanelColumns * static_cast<int64_t>(sizeof(float));
  }
};

/// Task `task` of p.plan. Tasks of one group of panels follow each other, so that a thread's panels stay in its cache.
/// X is the depthwise stage's input type, T that of residual and y: they differ where a prologue was applied
/// beforehand.
template <class X, class T>
void separable_fprop_task(const SeparableFprop& p, int64_t task, void* scratch) {
  const DepthwiseShape& shape = p.depthwise.shape;
  const Pointwise& pw = p.pointwise;
  const int64_t tile = task % p.plan.tiles;
  const Range panels = p.plan.group_panels(task / p.plan.tiles);
  const Range pixels{tile * p.plan.tile_pixels, std::min((tile + 1) * p.plan.tile_pixels, shape.pixels_out())};
  const int64_t m = pixels.end - pixels.begin;
  char* z = static_cast<char*>(scratch);
  float* products = reinterpret_cast<float*>(z + p.tile_bytes());

  const Storage storage = pw.pairs ? Storage::kBFloat16 : Storage::kFloat;
  for (int64_t pass = 0; pass < shape.multiplier; ++pass) {
    const RunOutput to{z + pass * shape.c * pw.z_bytes(), pw.z_stride, storage};
    depthwise_fprop_run<X>(p.depthwise, pass, pixels, {0, shape.c}, to);
  }
  if (pw.depth > shape.c * shape.multiplier) {
    for (int64_t i = 0; i < m; ++i) std::memset(z + (i * pw.z_stride + pw.depth - 1) * pw.z_bytes(), 0, pw.z_bytes());
  }
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    if (p.gemm) {
      const int64_t n0 = panel * kPanelColumns;
      const int64_t columns = std::min(kPanelColumns, pw.c_out - n0);
      p.gemm(m, round_up(columns, 16), pw.depth, pw.z_stride, kPanelColumns, kPanelColumns, z, pw.panel(panel),
             products);
      detail::finish_rows<T>(pw, products, m, n0, columns, pixels.begin);
    } else {
      multiply_panel<T>(pw, z, panel, m, pixels.begin, products);
    }
  }
}

}  // namespace xsep::cpu
