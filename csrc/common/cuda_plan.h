// How the CUDA kernels cut a problem into the work of threads and CTAs: pure functions of sizes and device facts.
// The launchers ask these functions, and so do the tests and xsep.explain, through pybind11.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace xsep::cuda {

struct DeviceProperties {
  int multiprocessors;
  int shared_bytes_per_cta;  // with opt-in: 227 KB on sm_90, 163 on sm_80, 99 on sm_86 and sm_89
  int l2_bytes;
};

// A depthwise convolution's sizes. P and Q are given, so nothing here depends on how much was padded at the far ends.
struct ConvShape {
  int n, h, w, c_in;  // x [N, H, W, C_in]
  int p, q, c_mid;    // z [N, P, Q, C_mid], C_mid a multiple of C_in
  int r, s;
  int stride_h, stride_w;
  int pad_top, pad_left;
  int dilation_h, dilation_w;
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Shared memory is carved into buffers that start on multiples of this.
inline constexpr int kSharedAlignment = 128;
constexpr int shared_bytes_of(int bytes) { return ceil_div(bytes, kSharedAlignment) * kSharedAlignment; }

// Registers let 2 or 3 CTAs of the depthwise backward be resident on a multiprocessor. It has one wave only, since every
// CTA leaves a partial sum.
inline constexpr int kBpropCtasPerSm = 2;

// The depthwise kernels. A thread computes strips of kStripWidth neighbouring columns, for one vector of channels; a CTA's threads lie over vectors (fastest, so that accesses are coalesced), then strips.
inline constexpr int kStripWidth = 4;
inline constexpr int kDepthwiseThreads = 128;

// Channels a thread of the forward, and vectors of them a CTA at most.
inline constexpr int kFpropVec = 4;
inline constexpr int kFpropVectors = 32;

// CTAs of the forward that are to be resident on a multiprocessor: registers for the open rows, and two rows of x.
constexpr int fprop_ctas_per_sm(int k, int stride, int element_bytes) {
  if (k == 3) return (stride == 1 ? 3 : 2) + (element_bytes == 2 ? 1 : 0);
  return k == 5 && stride == 1 && element_bytes == 2 ? 3 : 2;
}

// In x, not z: a strip starts where a tap of even index falls on it, so that its taps are known at compile time.
constexpr int bprop_strip_rows(int stride) { return stride; }

// Sums for every tap stay in a thread's registers, so the larger filters take fewer channels a thread.
constexpr int bprop_vec(int k) { return k == 3 ? 4 : 2; }

struct DepthwisePlan {
  bool sliding_window;  // else the general kernels: any filter, stride, dilation, channel count and multiplier
  int vec;              // channels a thread
  int vectors;          // vectors a CTA
  int slices;           // CTAs side by side along the channels
  int strip_rows;       // rows of a strip
  int strips_down, strips_across;  // threads of a CTA over the picture
  int tiles_down, tiles_across;    // CTA tiles a picture
  int workers;                     // CTAs that share the tiles of a slice
  int shared_bytes;
};

namespace detail {

inline bool has_sliding_window(const ConvShape& c) {
  return c.r == c.s && (c.r == 3 || c.r == 5 || c.r == 7) && c.stride_h == c.stride_w &&
         (c.stride_h == 1 || c.stride_h == 2) && c.dilation_h == 1 && c.dilation_w == 1 && c.c_mid == c.c_in &&
         c.pad_top >= 0 && c.pad_left >= 0;
}

// Chooses how many vectors of channels a CTA takes: the fewest lanes idle in the last slice, then the widest.
inline int vectors_of_a_cta(int total, int most) {
  const int least = std::max(1, most / 2);
  if (total <= most) return total;
  int best = most, best_waste = ceil_div(total, most) * most - total;
  for (int v = most - 1; v >= least; --v) {
    const int waste = ceil_div(total, v) * v - total;
    if (waste < best_waste) best = v, best_waste = waste;
  }
  return best;
}

// Fills in strips and tiles for a plane of `rows` x `columns` pixels: few idle threads, and compact tiles, which read
// little halo twice.
inline void tile_plane(DepthwisePlan& plan, int rows, int columns, int halo) {
  const int strips = kDepthwiseThreads / plan.vectors;
  const int rows_of_strips = ceil_div(rows, plan.strip_rows), columns_of_strips = ceil_div(columns, kStripWidth);
  double best = -1.0;
  for (int across = 1; across <= std::min(strips, columns_of_strips); ++across) {
    const int down = std::min(strips / across, rows_of_strips);
    const double useful =
        static_cast<double>(rows_of_strips) * columns_of_strips /
        (static_cast<double>(ceil_div(rows_of_strips, down)) * ceil_div(columns_of_strips, across) * strips);
    const double height = down * plan.strip_rows, width = across * kStripWidth;
    const double score = useful * height * width / ((height + halo) * (width + halo));
    if (score > best) best = score, plan.strips_down = down, plan.strips_across = across;
  }
  plan.tiles_down = ceil_div(rows_of_strips, plan.strips_down);
  plan.tiles_across = ceil_div(columns_of_strips, plan.strips_across);
}

// Fills in strips and tiles of a kernel whose threads walk down their strips: as long as all multiprocessors have work,
// since a strip begins with rows that another one reads too. A step is one row of x.
inline void tile_walks(DepthwisePlan& plan, const ConvShape& c, int ctas) {
  constexpr double kSetUp = 4;  // steps that a strip takes beside those of its rows
  const int strips = kDepthwiseThreads / plan.vectors, columns_of_strips = ceil_div(c.q, kStripWidth);
  const int workers = std::max(1, ctas / plan.slices);
  double best = 0.0;
  for (const int parts : {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64}) {
    const int rows = ceil_div(c.p, parts), rows_of_strips = ceil_div(c.p, rows);
    if (parts > 1 && rows < 4) break;
    for (int across = 1; across <= std::min(strips, columns_of_strips); ++across) {
      const int down = std::min(strips / across, rows_of_strips);
      const double tiles = static_cast<double>(c.n) * ceil_div(rows_of_strips, down) * ceil_div(columns_of_strips, across);
      const double steps = std::ceil(tiles / workers) * ((rows - 1) * c.stride_h + c.r + kSetUp);
      if (best != 0.0 && steps >= best) continue;
      best = steps;
      plan.strip_rows = rows, plan.strips_down = down, plan.strips_across = across;
    }
  }
  plan.tiles_down = ceil_div(ceil_div(c.p, plan.strip_rows), plan.strips_down);
  plan.tiles_across = ceil_div(columns_of_strips, plan.strips_across);
}

// CTAs that share the tiles of a slice, and load its weights once each.
inline bool share_out(DepthwisePlan& plan, const ConvShape& c, int ctas) {
  const int64_t tiles = static_cast<int64_t>(c.n) * plan.tiles_down * plan.tiles_across;
  if (tiles > std::numeric_limits<int>::max()) return false;
  plan.workers = std::max(1, std::min(static_cast<int>(tiles), ctas / plan.slices));
  return plan.slices <= 65535;
}

inline DepthwisePlan general_plan(const DeviceProperties& device) {
  DepthwisePlan plan{};
  plan.workers = device.multiprocessors * 8;
  return plan;
}

}  // namespace detail

// element_bytes: 2 or 4. aligned: every tensor starts on a 16-byte boundary.
inline DepthwisePlan plan_depthwise_fprop(const ConvShape& c, int element_bytes, bool aligned,
                                          const DeviceProperties& device) {
  DepthwisePlan plan{};
  plan.vec = kFpropVec;
  if (!aligned || !detail::has_sliding_window(c) || c.c_in % plan.vec != 0) return detail::general_plan(device);
  plan.sliding_window = true;
  plan.vectors = detail::vectors_of_a_cta(c.c_in / plan.vec, kFpropVectors);
  plan.slices = ceil_div(c.c_in / plan.vec, plan.vectors);
  const int ctas = device.multiprocessors * fprop_ctas_per_sm(c.r, c.stride_h, element_bytes);
  detail::tile_walks(plan, c, ctas);
  // One float a tap and channel, and the four per-channel vectors of prologue and epilogue.
  const int table_row = kFpropVectors * plan.vec * 4;
  plan.shared_bytes = shared_bytes_of(c.r * c.s * table_row) + shared_bytes_of(4 * table_row);
  return detail::share_out(plan, c, ctas) ? plan : detail::general_plan(device);
}

// What the forward adds to shared_bytes to take statistics of y: three floats a thread and channel, and a count.
inline int fprop_statistics_bytes(const DepthwisePlan& plan) {
  return shared_bytes_of(3 * kDepthwiseThreads * plan.vec * 4) + shared_bytes_of(kDepthwiseThreads * 4);
}

// Rows of a partial: one a tap, then the sums for the prologue's scale and shift, or up to three of the training
// chain's.
inline constexpr int kMostGradientSums = 3;
inline int bprop_partial_rows(const ConvShape& c) { return c.r * c.s + kMostGradientSums; }

inline DepthwisePlan plan_depthwise_bprop(const ConvShape& c, int element_bytes, bool aligned,
                                          const DeviceProperties& device) {
  static_cast<void>(element_bytes);
  DepthwisePlan plan{};
  plan.vec = bprop_vec(c.r);
  if (!aligned || !detail::has_sliding_window(c) || c.c_in % plan.vec != 0) {
    plan = detail::general_plan(device);
    // The general wgrad adds up its pixels in this many shares; one partial each.
    const int64_t pixels = static_cast<int64_t>(c.n) * c.p * c.q;
    const int64_t columns = static_cast<int64_t>(ceil_div(c.c_mid, 32)) * c.r * c.s;
    const int64_t wanted = std::max<int64_t>(1, device.multiprocessors * 8 / std::max<int64_t>(1, columns));
    plan.workers = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, pixels / 256)));
    return plan;
  }
  plan.sliding_window = true;
  plan.vectors = detail::vectors_of_a_cta(c.c_in / plan.vec, 32);
  plan.slices = ceil_div(c.c_in / plan.vec, plan.vectors);
  plan.strip_rows = bprop_strip_rows(c.stride_h);
  detail::tile_plane(plan, c.h + c.pad_top % c.stride_h, c.w + c.pad_left % c.stride_w, (c.r - 1) / c.stride_h);
  // Weights and prologue vectors; then one filter row of every thread's sums, to be added up.
  const int table_row = plan.vectors * plan.vec * 4;
  plan.shared_bytes = shared_bytes_of(c.r * c.s * table_row) + shared_bytes_of(4 * table_row) +
                      shared_bytes_of(c.r * plan.strips_down * plan.strips_across * table_row);
  DepthwisePlan general = detail::general_plan(device);
  general.workers = 1;
  return detail::share_out(plan, c, device.multiprocessors * kBpropCtasPerSm) ? plan : general;
}

}  // namespace xsep::cuda
