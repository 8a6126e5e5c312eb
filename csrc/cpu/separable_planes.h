// Fused separable forward of NCHW as it lies, in float: rows of z, plane by plane in the second-level cache, are the
// right side of the product, and the pointwise weights as they lie its left side. Nothing is turned round, vectors go
// along pixels, and few output channels leave no lanes idle.
#pragma once

#include <algorithm>

#include "../common/cpu_plan.h"
#include "gemm.h"
#include "plane_fprop.h"

namespace xsep::cpu {

struct SeparableOfPlanes {
  PlaneFprop depthwise;  // its output affine is the middle; y is not used
  CpuSeparablePlanesPlan plan;
  int64_t c_out;
  const float* w_pw;       // [c_out, c_mid]
  ChannelAffine epilogue;  // scale and shift [c_out]
  const void* residual;    // T [n, c_out, p, q], may be null
  void* y;                 // T [n, c_out, p, q]

  int64_t c_mid() const { return depthwise.shape.c * depthwise.shape.multiplier; }
  int64_t z_bytes() const { return round_up(c_mid() * plan.z_step * static_cast<int64_t>(sizeof(float)), 64); }
  /// Of a thread: z of some rows, and rows of the input.
  int64_t scratch_bytes() const { return z_bytes() + depthwise.scratch_bytes(); }
};

namespace detail {

/// Pixels of a block's products, which stay in the first-level cache until they are finished.
constexpr int64_t kPlaneProducts = 128;

/// y at [0, pixels) of one channel, which is the epilogue's in all lanes, from its products.
template <class T>
void finish_plane_row(const ChannelAffine& epilogue, const float* products, int64_t pixels, const T* residual, T* y) {
  constexpr int kVectors = 4;
  for (int64_t i = 0; i < pixels; i += kVectors * kLanes) {
    Vec v[kVectors];
    const auto lanes = [&](int j) { return std::clamp<int64_t>(pixels - i - j * kLanes, 0, kLanes); };
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) v[j] = load(products + i + j * kLanes);
    scale_and_shift(epilogue, 0, v);
    if (residual) {
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        if (lanes(j) > 0) v[j] = v[j] + load_lanes(residual + i + j * kLanes, lanes(j));
      }
    }
    activate(v, epilogue.activation, epilogue.alpha);
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      if (lanes(j) > 0) store_lanes(y + i + j * kLanes, v[j], lanes(j));
    }
  }
}

/// y of kProductRows channels from c on for kVectors vectors of pixels, the last one perhaps in part: from registers,
/// where there is no residual, and no activation or ReLU. y: the first channel's first pixel.
template <class T, int kVectors>
void multiply_and_finish_planes(const SeparableOfPlanes& p, const Product& product, int64_t c, int64_t pixels, T* y,
                                int64_t plane) {
  constexpr int kRows = kProductRows;
  Vec sum[kRows][kVectors];
  set_zero(sum);
  multiply_in_registers<false>(product, sum);
  const ChannelAffine& e = p.epilogue;
  const int64_t last = pixels - (kVectors - 1) * kLanes;
  XSEP_UNROLL
  for (int i = 0; i < kRows; ++i) {
    XSEP_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      if (e.scale) sum[i][j] = sum[i][j] * broadcast(e.scale[c + i]);
      if (e.shift) sum[i][j] = sum[i][j] + broadcast(e.shift[c + i]);
      if (e.activation == Activation::kRelu) sum[i][j] = relu(sum[i][j]);
    }
  }
  if (last < kLanes) {
    XSEP_UNROLL
    for (int i = 0; i < kRows; ++i) store_first(y + i * plane + (kVectors - 1) * kLanes, sum[i][kVectors - 1], last);
  }
  const int whole = last < kLanes ? kVectors - 1 : kVectors;
  XSEP_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    if (j >= whole) continue;
    XSEP_UNROLL
    for (int i = 0; i < kRows; ++i) store(y + i * plane + j * kLanes, sum[i][j]);
  }
}

/// y of all channels for pixels next to each other in their planes. z [c_mid, z_step] is theirs, at is their place in
/// y and the residual.
template <class T>
void multiply_planes(const SeparableOfPlanes& p, const float* z, int64_t pixels, int64_t at) {
  constexpr int64_t kLineElements = kLineBytes / static_cast<int64_t>(sizeof(T));
  alignas(64) float products[kProductRows * kPlaneProducts];
  const int64_t plane = p.depthwise.shape.p * p.depthwise.shape.q;
  Product product{p.w_pw, p.c_mid(), 1, z, p.plan.z_step, products, kPlaneProducts, p.c_mid(), false};
  product.next = reinterpret_cast<const char*>(z);  // nothing else is wanted soon
  T* const y = static_cast<T*>(p.y) + at;
  const T* const residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
  const Activation activation = p.epilogue.activation;
  const bool in_registers = !residual && (activation == Activation::kIdentity || activation == Activation::kRelu);
  for (int64_t c = 0; c < p.c_out; c += kProductRows) {
    const int64_t rows = std::min<int64_t>(kProductRows, p.c_out - c);
    product.a = p.w_pw + c * p.c_mid();
    for (int64_t i = 0; i < pixels;) {
      T* const to = y + c * plane + i;
      const bool from_registers = in_registers && rows == kProductRows;
      const int64_t step = from_registers ? kProductVectors * kLanes : kPlaneProducts;
      const int64_t count = std::min(step, pixels - i);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = 0; j < count; j += kLineElements) __builtin_prefetch(to + row * plane + j, 1, 2);
      }
      product.b = z + i;
      if (from_registers) {
        with_vectors(ceil_div(count, kLanes), [&](auto vectors) __attribute__((always_inline)) {
          const int64_t some = std::min<int64_t>(count, vectors() * kLanes);
          multiply_and_finish_planes<T, vectors()>(p, product, c, some, to, plane);
          i += some;
        });
        continue;
      }
      Soon nothing;
      multiply<false>(product, rows, count, nothing);
      for (int64_t row = 0; row < rows; ++row) {
        const OfOneChannel epilogue(p.epilogue, c + row);
        finish_plane_row(epilogue.affine, products + row * kPlaneProducts, count,
                         residual ? residual + (c + row) * plane + i : nullptr, to + row * plane);
      }
      i += count;
    }
  }
}

}  // namespace detail

/// Task `task` of p.plan: some rows of one picture. scratch: p.scratch_bytes(), behind the first p.z_bytes() of them
/// zero or left by another task.
template <class T>
void separable_planes_task(const SeparableOfPlanes& p, int64_t task, void* scratch) {
  const DepthwiseShape& s = p.depthwise.shape;
  const int64_t picture = task / p.plan.row_groups, first = task % p.plan.row_groups * p.plan.group_rows;
  const Range rows{first, std::min(first + p.plan.group_rows, s.p)};
  float* const z = static_cast<float*>(scratch);
  char* const brought = static_cast<char*>(scratch) + p.z_bytes();
  for (int64_t c = 0; c < s.c; ++c) {
    plane_outputs<T>(p.depthwise, picture * s.c + c, rows, brought, z + c * s.multiplier * p.plan.z_step,
                     p.plan.z_step);
  }
  detail::multiply_planes<T>(p, z, (rows.end - rows.begin) * s.q, (picture * p.c_out * s.p + first) * s.q);
}

}  // namespace xsep::cpu
