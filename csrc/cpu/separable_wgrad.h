// The pointwise weights' gradient with z made again on the way: tiles of z never leave the caches.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/cpu_plan.h"
#include "depthwise_fprop.h"
#include "gemm.h"
#include "pack.h"
#include "planes.h"

namespace xsep::cpu {

/// dw [c_out, c] = dv^T z, z = middle(dw(prologue(x))); multiplier 1.
struct SeparableWgrad {
  DepthwiseFprop depthwise;  // its output affine is the middle
  CpuWgradPlan plan;
  int64_t c_out;
  bool pairs;      // z and dv are multiplied as BFloat16
  const void* dv;  // T [pixels, c_out], or [n, c_out, plane] where plane is not 0
  int64_t plane;   // P * Q of an NCHW dv, else 0
  int64_t dw_row;  // a multiple of 16
  float* dw;       // [plan.pixel_groups, c_out, dw_row]

  /// Depths that are put into blocks together, where they do not lie as the product reads them.
  static constexpr int64_t kRowsAtOnce = 8;
  /// With fewer columns, values of a float dv are read too seldom to be put into blocks first.
  static constexpr int64_t kLeastColumns = 128;
  /// Tiles whose products one sum of float takes: an error grows with the length of its sum.
  static constexpr int64_t kTilesOfAPart = 32;

  int64_t z_bytes() const { return pairs ? 2 : 4; }
  /// From row to row of z: rows many powers of two apart would share few sets of the first-level cache.
  static int64_t z_row(int64_t columns) { return columns % 128 == 0 ? columns + 16 : columns; }
  int64_t z_tile_bytes() const { return round_up(plan.tile_pixels * z_row(plan.group_columns) * z_bytes(), 64); }
  /// From plane to plane of a tile of dv: not a distance of many powers of two.
  int64_t plane_bytes() const { return round_up(plan.tile_pixels * z_bytes(), 128) + 64; }
  int64_t blocks_bytes() const {
    return round_up(LeftBlocks::size(c_out, pairs ? ceil_div(plan.tile_pixels, 2) : plan.tile_pixels) * 4, 64);
  }
  /// dv as 32-bit elements: two pixels in one, or converted to float, in blocks, and rows on their way there; or pieces
  /// of its planes.
  int64_t dv_tile_bytes() const {
    return plane ? c_out * plane_bytes() : blocks_bytes() + round_up(kRowsAtOnce * c_out * 4, 64);
  }
  /// The sums of a part, where there are several.
  int64_t part_bytes() const {
    return plan.group_pixels > kTilesOfAPart * plan.tile_pixels ? c_out * z_row(plan.group_columns) * 4 : 0;
  }
  int64_t tile_bytes() const { return z_tile_bytes() * (pairs ? 2 : 1) + dv_tile_bytes() + part_bytes(); }
  /// What one thread needs: tiles, and rows of the input.
  int64_t scratch_bytes() const { return tile_bytes() + depthwise.input.bytes(); }
  RowWindow window(void* scratch) const { return {depthwise.input, static_cast<char*>(scratch) + tile_bytes()}; }
};

namespace detail {

/// Has product read dv of some pixels: where it lies, or from `tile` in blocks, converted or in pairs, or as pieces of
/// planes.
template <class T>
void give_dv(const SeparableWgrad& p, Range pixels, char* tile, Product& product) {
  const int64_t count = pixels.end - pixels.begin;
  const T* dv = static_cast<const T*>(p.dv) + pixels.begin * p.c_out;
  product.a = tile;
  if (p.plane) {
    // Neighbours in depth are neighbours in memory: pairs as they lie, the last pixel of an odd number beside a zero.
    const Planes<const T> planes{static_cast<const T*>(p.dv), p.c_out, p.plane};
    product.a_row = p.plane_bytes() / 4;
    product.a_step = 1;
    if (!p.pairs) return copy_planes(planes, pixels, reinterpret_cast<float*>(tile), product.a_row);
    T* const halves = reinterpret_cast<T*>(tile);
    copy_planes(planes, pixels, halves, 2 * product.a_row);
    for (int64_t c = 0; count % 2 != 0 && c < p.c_out; ++c) halves[2 * c * product.a_row + count] = T{};
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (p.plan.group_columns < SeparableWgrad::kLeastColumns) {
      product.a = dv, product.a_row = 1, product.a_step = p.c_out;
      return;
    }
  }
  const int64_t pixels_each = p.pairs ? 2 : 1;
  const LeftBlocks blocks{reinterpret_cast<float*>(tile), p.c_out, ceil_div(count, pixels_each)};
  blocks.give(product);
  float* const rows = reinterpret_cast<float*>(tile + p.blocks_bytes());
  for (int64_t k = 0; k < blocks.depth; k += SeparableWgrad::kRowsAtOnce) {
    const int64_t some = std::min(SeparableWgrad::kRowsAtOnce, blocks.depth - k);
    const T* from = dv + k * pixels_each * p.c_out;
    if constexpr (std::is_same_v<T, float>) {
      blocks.put(from, p.c_out, k, some);
    } else {
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (p.pairs) {
          const int64_t pixels_left = std::min(2 * some, count - 2 * k);
          interleave_rows(from, pixels_left, p.c_out, p.c_out, reinterpret_cast<uint32_t*>(rows), p.c_out);
        }
      }
      if (!p.pairs) to_floats(from, some * p.c_out, rows);
      blocks.put(rows, p.c_out, k, some);
    }
  }
}

/// to [rows, columns] += from, columns in whole vectors.
inline void add_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t row = 0; row < rows; ++row, from += from_row, to += to_row) {
    for (int64_t at = 0; at < columns; at += kLanes) store(to + at, load(to + at) + load(from + at));
  }
}

}  // namespace detail

/// Task `task` of p.plan: the sums of its own pixels and columns. X is the depthwise stage's input type, T that of dv.
/// window is one that p gave for this scratch.
template <class X, class T>
void separable_wgrad_task(const SeparableWgrad& p, int64_t task, RowWindow& window, void* scratch) {
  const CpuWgradPlan& plan = p.plan;
  const DepthwiseShape& shape = p.depthwise.shape;
  const int64_t group = task / plan.column_groups;
  const int64_t column = task % plan.column_groups * plan.group_columns;
  const Range channels{column, std::min(column + plan.group_columns, shape.c)};
  const int64_t columns = round_up(channels.end - channels.begin, 16), z_row = p.z_row(columns);
  const Range pixels{group * plan.group_pixels, std::min((group + 1) * plan.group_pixels, shape.pixels_out())};
  char* z = static_cast<char*>(scratch);
  char* dv_tile = z + p.z_tile_bytes();
  char* const part = dv_tile + p.dv_tile_bytes();
  char* z_pairs = part + p.part_bytes();
  float* const dw = p.dw + group * p.c_out * p.dw_row + column;
  const int64_t part_pixels = SeparableWgrad::kTilesOfAPart * plan.tile_pixels;

  window.forget();
  float* sums = dw;
  int64_t sums_row = p.dw_row, part_end = pixels.begin + part_pixels;
  bool add = false;
  for (int64_t pixel = pixels.begin; pixel < pixels.end; pixel += plan.tile_pixels) {
    const int64_t count = std::min(plan.tile_pixels, pixels.end - pixel);
    if (pixel == part_end) {
      if (sums != dw) detail::add_rows(sums, sums_row, p.c_out, columns, dw, p.dw_row);
      sums = reinterpret_cast<float*>(part), sums_row = z_row, part_end += part_pixels, add = false;
    }
    const RunOutput to{z - column * p.z_bytes(), z_row, p.pairs ? Storage::kBFloat16 : Storage::kFloat, 0};
    depthwise_fprop_run<X>(p.depthwise, {pixel, pixel + count}, channels, to, window);
    Product product{nullptr, 0, 0, z, z_row, sums, sums_row, count, add};
    add = true;
    detail::give_dv<T>(p, {pixel, pixel + count}, dv_tile, product);
    const Range after{pixel + count, std::min(pixel + count + plan.tile_pixels, pixels.end)};
    const Range x = input_of_next_run(p.depthwise, after, window);
    Soon soon{nullptr, 0, reinterpret_cast<const char*>(x.begin), x.end - x.begin};
    if (!p.plane) {
      soon.at = reinterpret_cast<const char*>(static_cast<const T*>(p.dv) + after.begin * p.c_out);
      soon.bytes = (after.end - after.begin) * p.c_out * static_cast<int64_t>(sizeof(T));
    }
    const int64_t blocks = ceil_div(p.c_out, kProductRows) * ceil_div(columns, kProductVectors * kLanes);
    soon.late(blocks * (p.pairs ? ceil_div(count, 2) : count));
    if (!p.pairs) {
      multiply<false>(product, p.c_out, columns, soon);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      interleave_rows(reinterpret_cast<const BFloat16*>(z), count, z_row, columns, reinterpret_cast<uint32_t*>(z_pairs),
                      z_row);
      product.b = z_pairs;
      product.depth = ceil_div(count, 2);
      multiply<true>(product, p.c_out, columns, soon);
    }
  }
  if (sums != dw) detail::add_rows(sums, sums_row, p.c_out, columns, dw, p.dw_row);
}

/// Rows [rows.begin, rows.end) of the partial sums [groups, c_out, dw_row], added up in the order of the groups, to
/// [c_out, c].
template <class T>
void reduce_wgrad(const float* partials, int64_t groups, int64_t c_out, int64_t dw_row, int64_t c, Range rows, T* out) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* from = partials + row * dw_row;
    for (int64_t at = 0; at < c; at += kLanes) {
      Vec sum = load(from + at);
      for (int64_t group = 1; group < groups; ++group) sum = sum + load(from + group * c_out * dw_row + at);
      if (at + kLanes <= c) {
        store(out + row * c + at, sum);
      } else {
        store_first(out + row * c + at, sum, c - at);
      }
    }
  }
}

}  // namespace xsep::cpu
