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

// Registers let 2 CTAs of the depthwise backward be resident on a multiprocessor. It has one wave only, since every CTA
// leaves a partial sum.
inline constexpr int kBpropCtasPerSm = 2;

// The depthwise kernels. A thread computes strips of kStripWidth neighbouring columns, for one vector of channels; a
// CTA's threads lie over vectors (fastest, so that accesses are coalesced), then strips.
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

// Sums for every tap stay in a thread's registers, so the larger filters take fewer channels a thread.
constexpr int bprop_vec(int k) { return k == 3 ? 4 : 2; }
inline constexpr int kBpropVectors = 32;  // a CTA, at most

struct DepthwisePlan {
  bool sliding_window;  // else the general kernels: any filter, stride, dilation, channel count and multiplier
  int vec;              // channels a thread
  int vectors;          // vectors a CTA
  int slices;           // CTAs side by side along the channels
  int strip_rows;       // rows of a strip
  int strips_down, strips_across;  // threads of a CTA over the picture
  int tiles_down, tiles_across;    // CTA tiles a picture
  int workers;                     // CTAs that share the tiles of a slice; backward also rows of the partial sums
  int dgrad_workers;               // CTAs of the general dgrad where no sums tie it to those rows
  int shared_bytes;
};

namespace detail {

inline bool has_sliding_window(const ConvShape& c) {
  return c.r == c.s && (c.r == 3 || c.r == 5 || c.r == 7) && c.stride_h == c.stride_w &&
         (c.stride_h == 1 || c.stride_h == 2) && c.dilation_h == 1 && c.dilation_w == 1 && c.c_mid == c.c_in &&
         c.pad_top >= 0 && c.pad_left >= 0;
}

// A plane that is walked over: pictures of rows x columns, of which a thread takes `unit` rows a step, after so many
// steps that begin its strip and that another strip takes too.
struct WalkedPlane {
  int pictures, rows, columns, unit, first_steps;
  int vectors, vector_bytes;  // of a pixel
};

// Fills in vectors, slices, strips and tiles. A strip goes as far down as leaves work for all CTAs that are resident at
// a time; of the ways to share a CTA's threads out over channels and columns, the one that should take the least time.
inline void tile_walks(DepthwisePlan& plan, const WalkedPlane& plane, int most_vectors, int ctas) {
  constexpr int kSetUp = 4, kSectorBytes = 32;  // steps that a strip takes beside its own; and what L2 is read in
  const int units = ceil_div(plane.rows, plane.unit), columns_of_strips = ceil_div(plane.columns, kStripWidth);
  const int least = std::max(1, most_vectors / 2);
  double best = std::numeric_limits<double>::infinity();
  for (int slices = ceil_div(plane.vectors, most_vectors);; ++slices) {
    const int vectors = ceil_div(plane.vectors, slices);
    if (plan.vectors > 0 && vectors < least) break;
    const int strips = kDepthwiseThreads / vectors, workers = std::max(1, ctas / slices);
    const double bytes = vectors * plane.vector_bytes;
    const double sectors = slices > 1 && vectors * plane.vector_bytes % kSectorBytes != 0 ? 1.0 + 24.0 / bytes : 1.0;
    for (const int parts : {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64}) {
      const int steps = ceil_div(units, parts), rows_of_strips = ceil_div(units, steps);
      if (parts > 1 && steps < 4) break;
      for (int across = 1; across <= std::min(strips, columns_of_strips); ++across) {
        const int down = std::min(strips / across, rows_of_strips);
        const double tiles =
            static_cast<double>(plane.pictures) * ceil_div(rows_of_strips, down) * ceil_div(columns_of_strips, across);
        // Neighbouring strips of a CTA find their common columns in L1; those of other CTAs are read from L2.
        const double columns = 1.0 + static_cast<double>(plane.first_steps * plane.unit) / (across * kStripWidth);
        const double time = std::ceil(tiles / workers) * (steps + plane.first_steps + kSetUp) * columns * sectors;
        if (time >= best) continue;
        best = time;
        plan.vectors = vectors, plan.slices = slices;
        plan.strip_rows = steps * plane.unit, plan.strips_down = down, plan.strips_across = across;
      }
    }
  }
  plan.tiles_down = ceil_div(ceil_div(plane.rows, plan.strip_rows), plan.strips_down);
  plan.tiles_across = ceil_div(columns_of_strips, plan.strips_across);
}

// Kernels count tiles in 32 bits, and from the last one a step further.
inline constexpr int kMostTiles = std::numeric_limits<int>::max() / 2;

// CTAs that share the tiles of a slice, and load its weights once each.
inline bool share_out(DepthwisePlan& plan, const ConvShape& c, int ctas) {
  const int64_t tiles = static_cast<int64_t>(c.n) * plan.tiles_down * plan.tiles_across;
  if (tiles > kMostTiles) return false;
  plan.workers = std::max(1, std::min(static_cast<int>(tiles), ctas / plan.slices));
  return plan.slices <= 65535;
}

inline DepthwisePlan general_plan(const DeviceProperties& device) {
  DepthwisePlan plan{};
  plan.workers = device.multiprocessors * 8;
  return plan;
}

}  // namespace detail

// element_bytes: 2 or 4. aligned: every image starts where one of a thread's vectors of channels may.
inline DepthwisePlan plan_depthwise_fprop(const ConvShape& c, int element_bytes, bool aligned,
                                          const DeviceProperties& device) {
  DepthwisePlan plan{};
  plan.vec = kFpropVec;
  if (!aligned || !detail::has_sliding_window(c) || c.c_in % plan.vec != 0) return detail::general_plan(device);
  plan.sliding_window = true;
  const int ctas = device.multiprocessors * fprop_ctas_per_sm(c.r, c.stride_h, element_bytes);
  const detail::WalkedPlane plane{
      c.n, c.p, c.q, 1, (c.r - 1) / c.stride_h, c.c_in / plan.vec, plan.vec * element_bytes};
  detail::tile_walks(plan, plane, kFpropVectors, ctas);
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

namespace detail {

// The general wgrad has a CTA for each tap, share of the pixels and kGeneralChannels channels; the general dgrad for no
// tap, so that it wants more shares. Where it leaves sums, a row of the partials each, both have as many as it wants,
// if only rows of so many bytes are written and read again.
inline DepthwisePlan general_bprop_plan(const ConvShape& c, const DeviceProperties& device) {
  constexpr int kGeneralChannels = 32;
  constexpr int64_t kLeastPixels = 256, kMostPartialBytes = 8 << 20;
  DepthwisePlan plan = general_plan(device);
  const int64_t ctas = plan.workers, taps = static_cast<int64_t>(c.r) * c.s;
  const auto shares = [](int64_t wanted, int64_t pixels) {
    return static_cast<int>(std::max<int64_t>(1, std::min(wanted, pixels / kLeastPixels)));
  };
  plan.dgrad_workers = shares(ctas / ceil_div(c.c_in, kGeneralChannels), static_cast<int64_t>(c.n) * c.h * c.w);
  const int64_t row_bytes = (taps + kMostGradientSums) * c.c_mid * 4;
  const int64_t of_dgrad = std::min<int64_t>(plan.dgrad_workers, kMostPartialBytes / row_bytes);
  const int64_t of_wgrad = ctas / (ceil_div(c.c_mid, kGeneralChannels) * taps);
  plan.workers = shares(std::max(of_dgrad, of_wgrad), static_cast<int64_t>(c.n) * c.p * c.q);
  return plan;
}

}  // namespace detail

inline DepthwisePlan plan_depthwise_bprop(const ConvShape& c, int element_bytes, bool aligned,
                                          const DeviceProperties& device) {
  DepthwisePlan plan{};
  plan.vec = bprop_vec(c.r);
  if (!aligned || !detail::has_sliding_window(c) || c.c_in % plan.vec != 0) {
    return detail::general_bprop_plan(c, device);
  }
  plan.sliding_window = true;
  const int ctas = device.multiprocessors * kBpropCtasPerSm;
  const detail::WalkedPlane plane{c.n,
                                  c.h + c.pad_top % c.stride_h,
                                  c.w + c.pad_left % c.stride_w,
                                  c.stride_h,
                                  (c.r - 1) / c.stride_h,
                                  c.c_in / plan.vec,
                                  plan.vec * element_bytes};
  detail::tile_walks(plan, plane, kBpropVectors, ctas);
  // Weights and prologue vectors; then one filter row of every thread's sums, to be added up.
  const int table_row = kBpropVectors * plan.vec * 4;
  plan.shared_bytes = shared_bytes_of(c.r * c.s * table_row) + shared_bytes_of(4 * table_row) +
                      shared_bytes_of(c.r * plan.strips_down * plan.strips_across * plan.vectors * plan.vec * 4);
  return detail::share_out(plan, c, ctas) ? plan : detail::general_bprop_plan(c, device);
}

}  // namespace xsep::cuda
