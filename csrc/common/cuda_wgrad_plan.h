// How the gradient of the pointwise weights is made in one kernel, z never leaving the chip, and whether that should
// pay.
#pragma once

#include "cuda_clocks.h"
#include "cuda_separable_plan.h"

namespace xsep::cuda {

// How dw_pw is shared out. A CTA has all outputs, and so many chunks of channels that its warps hold their part of
// dw_pw between them from its first tile to its last, a block of kWarpChannels x kWarpChannels each; what warps are
// left share out the pixels.
struct WgradSplit {
  int output_blocks;  // of kWarpChannels outputs
  int shares;         // warps that share the pixels of one block
  int parts;          // of the channels, a row of CTAs each
};

// Where a raw output's kernel has more in shared memory: r of one tile, and [3, C_out] floats.
struct WgradExtras {
  int r, coef;
  int shared_bytes;  // of all
};

struct SeparableWgradPlan {
  bool on_chip;  // the kernel is made for it; whether it pays is told by the clocks
  // The forward's walk over tiles of y, with dy in the place of w_pw; its chunks are those of one part, its workers the
  // CTAs of one.
  SeparablePlan walk;
  WgradSplit split;
  WgradExtras extras;
  double clocks, staged_clocks;  // that it should take, and kernel after kernel: depthwise, then a GEMM
};

// What stands for dy: it, or in the training chain dr, formed of two images that are copied and stored once it is
// there.
enum class WgradUpstream { kGradient, kRawOutput };

inline constexpr int kWgradChunkBytes = 128;
static_assert(kWgradChunkBytes == 2 * kWarpChannels, "a block is one chunk of 16-bit channels wide");

namespace detail {

// Fills in what follows from the walk's row_warps, tile_columns and group_rows; false where the kernel could not count
// so far.
inline bool complete_wgrad_plan(SeparableWgradPlan& plan, const ConvShape& c, int c_out) {
  SeparablePlan& walk = plan.walk;
  walk.chunk_bytes = kWgradChunkBytes;
  if (!complete_fused_plan(walk, c, c_out, 2)) return false;
  plan.split.output_blocks = ceil_div(c_out, kWarpChannels);
  plan.split.parts = ceil_div(walk.chunks, kMostFusedWarps / plan.split.output_blocks);
  walk.chunks = ceil_div(walk.chunks, plan.split.parts);
  plan.split.shares = kMostFusedWarps / (walk.chunks * plan.split.output_blocks);
  walk.warps = kMostFusedWarps, walk.by_warps = divisor_of(kMostFusedWarps);
  walk.channel_warps = 0;  // there is no epilogue
  walk.table_channels = plan.split.parts * walk.chunks * kWarpChannels;
  walk.tap_words = (walk.table_channels + kFusedZeroChannels) * c.s * diagonal_taps(c.r);
  walk.operand_rows = plan.split.output_blocks * walk.z_rows;
  return true;
}

// Buffers for dy, a tile each: it comes with the second step's x, and stays for the tile's last one.
constexpr int wgrad_operand_buffers(int halos, int chunks) { return ceil_div(halos - 1, chunks) + 1; }

inline void lay_out_wgrad_memory(SeparablePlan& walk, int halos) {
  lay_out_shared_memory(walk, halos, wgrad_operand_buffers(halos, walk.chunks));
  walk.keeps_w_pw = false;
}

// Takes as many buffers for x as fit. r has one buffer, which must be read before it is written again: in the turn in
// which its tile is the one to be multiplied.
inline bool fit_wgrad_into_shared_memory(SeparableWgradPlan& plan, int c_out, WgradUpstream upstream, int limit) {
  SeparablePlan& walk = plan.walk;
  const bool forms_dr = upstream == WgradUpstream::kRawOutput;
  for (int halos = forms_dr ? std::min(kMostHalos, walk.chunks + 1) : kMostHalos; halos >= 2; --halos) {
    lay_out_wgrad_memory(walk, halos);
    plan.extras.r = walk.shared_bytes;
    plan.extras.coef = plan.extras.r + (forms_dr ? shared_bytes_of(walk.operand_rows * kWgradChunkBytes) : 0);
    plan.extras.shared_bytes = plan.extras.coef + (forms_dr ? shared_bytes_of(3 * c_out * 4) : 0);
    if (plan.extras.shared_bytes <= limit) return true;
  }
  return false;
}

// What the kernel and the one that adds up its sums should cost, in clocks of the busiest multiprocessor, as
// fused_clocks has it for the forward; no card has confirmed it.
inline double wgrad_clocks(const SeparableWgradPlan& plan, const ConvShape& c, int c_out, WgradUpstream upstream,
                           const DeviceProperties& device) {
  constexpr double kLanes = 128.0, kLatency = 1000.0, kBarrier = 60.0, kSharedBytesAClock = 128.0;
  const SeparablePlan& walk = plan.walk;
  const StepWork z = diagonal_work(walk, c);
  const int products = walk.z_rows / 16, own = ceil_div(products, plan.split.shares);  // steps of mma along the pixels
  // A block's step: 8 ldmatrix, 32 mma, and addresses.
  constexpr double kProduct = 48.0, kProductMma = 32.0, kProductBytes = 8 * 512.0;
  const double blocks = static_cast<double>(plan.split.output_blocks) * products;
  const double x_pieces = kWgradChunkBytes / 16.0 * walk.halo_rows * walk.halo_pitch;
  const double dy_pieces = kWgradChunkBytes / 16.0 * walk.operand_rows / walk.chunks;
  const double mapped = walk.halo_rows * walk.halo_pitch * 60.0 / walk.chunks;
  const double each_warp = 32.0 * kMostFusedWarps * 150;  // from step to step
  const bool forms_dr = upstream == WgradUpstream::kRawOutput;
  const double copied = forms_dr ? 2.0 : 1.0, formed = forms_dr ? 60.0 : 0.0;  // du and r; from them to dr
  const double instructions =
      z.instructions + 32 * blocks * kProduct + x_pieces * 30 + dy_pieces * (10 * copied + formed) + mapped + each_warp;
  const double issuing = instructions / kLanes + kBarrier;
  const double sharing = (z.shared_bytes + blocks * kProductBytes + 16 * (x_pieces + dy_pieces)) / kSharedBytesAClock;
  const double multiplying = (z.multiply_adds + blocks * kProductMma * 2048) / kMmaSyncMultiplyAdds;
  const double loading = 16 * (x_pieces + copied * dy_pieces) / kL2BytesAClock;
  const double alone = z.alone + own * kProductMma * 2048 / (kMmaSyncMultiplyAdds / 4);
  constexpr double kAlongside = 0.02;  // as in fused_clocks
  const double step = std::max({issuing, sharing, multiplying, loading, kLatency / (walk.halos - 1), alone}) +
                      kAlongside * (issuing + sharing + multiplying + loading);
  const double rounds = ceil_div(walk.tiles, walk.workers);
  const double outputs = static_cast<double>(c.n) * c.p * c.q * c_out * (forms_dr ? 3 : 1);  // dr is stored, too
  const double bytes = 2.0 * (static_cast<double>(c.n) * c.h * c.w * c.c_in + outputs);
  const double memory = bytes / kMemoryBytesAClock / device.multiprocessors;
  const double partials = 2.0 * 4 * walk.workers * plan.split.shares * static_cast<double>(c_out) * c.c_in;
  constexpr double kStart = 4000.0;  // tables, and the first tile's latency before anything is multiplied
  const double computing = rounds * walk.chunks * step;
  return kStart + std::max(computing, memory) + kAlongside * std::min(computing, memory) +
         partials / kL2BytesAClock / device.multiprocessors + 2 * kLaunchClocks;
}

// The same of the depthwise kernel and a GEMM, z going through memory.
inline double staged_wgrad_clocks(const ConvShape& c, int c_out, const DeviceProperties& device) {
  const double pixels = static_cast<double>(c.n) * c.p * c.q, z = 2 * pixels * c.c_in, dy = 2 * pixels * c_out;
  const double x = 2.0 * c.n * c.h * c.w * c.c_in;
  const double product = pixels * c.c_in * c_out / kGemmMultiplyAdds;
  return ((x + z) / kMemoryBytesAClock + std::max(product, (z + dy) / kMemoryBytesAClock)) / device.multiprocessors +
         2 * kLaunchClocks;
}

// dr as a pass of its own, du and r read and dr written.
inline double raw_gradient_clocks(const ConvShape& c, int c_out, const DeviceProperties& device) {
  return 6.0 * c.n * c.p * c.q * c_out / kMemoryBytesAClock / device.multiprocessors + kLaunchClocks;
}

// Of the ways to cut y into tiles, the one that should take the least time.
inline SeparableWgradPlan plan_wgrad(const ConvShape& c, int c_out, int element_bytes, bool aligned,
                                     WgradUpstream upstream, const DeviceProperties& device) {
  const SeparableWgradPlan staged{};
  const bool filter = c.r == c.s && (c.r == 3 || c.r == 5) && has_sliding_window(c);
  const int64_t rows = static_cast<int64_t>(c.n) * c.p;
  if (!aligned || element_bytes != 2 || !filter || c.n < 1 || c.c_in > device.shared_bytes_per_cta || rows > kMost ||
      static_cast<int64_t>(c.n) * c.h > kMost || c.c_in % 8 != 0 || c_out % 8 != 0 ||
      c_out > kWarpChannels * kMostFusedWarps) {
    return staged;
  }
  SeparableWgradPlan best = staged;
  const auto consider = [&](int row_warps, int columns, bool across_pictures) {
    SeparableWgradPlan plan{};
    plan.walk.row_warps = row_warps, plan.walk.tile_columns = columns;
    plan.walk.group_rows = across_pictures ? static_cast<int>(rows) : c.p;
    if (!complete_wgrad_plan(plan, c, c_out) || plan.split.parts > device.multiprocessors) return;
    if (!fit_wgrad_into_shared_memory(plan, c_out, upstream, device.shared_bytes_per_cta)) return;
    plan.walk.workers = std::min(plan.walk.tiles, device.multiprocessors / plan.split.parts);
    plan.clocks = wgrad_clocks(plan, c, c_out, upstream, device);
    plan.staged_clocks = staged_wgrad_clocks(c, c_out, device);
    if (!best.on_chip || plan.clocks < best.clocks) best = plan, best.on_chip = true;
  };
  for (int row_warps = kMostFusedWarps; row_warps >= 1; row_warps /= 2) {
    for_each_width(c.q, row_warps * kWarpPixels, [&](int columns) {
      for (const bool across_pictures : {false, true}) consider(row_warps, columns, across_pictures);
    });
  }
  return best;
}

}  // namespace detail

inline SeparableWgradPlan plan_separable_wgrad(const ConvShape& c, int c_out, int element_bytes, bool aligned,
                                               const DeviceProperties& device) {
  return detail::plan_wgrad(c, c_out, element_bytes, aligned, WgradUpstream::kGradient, device);
}

// Whether the planner would rather have it than kernel by kernel: with a margin, as its instructions are counted, and
// no card has said in what part of its clocks it issues them.
inline bool pays(const SeparableWgradPlan& plan) {
  constexpr double kMargin = 0.85;
  return plan.on_chip && plan.clocks < kMargin * plan.staged_clocks;
}

// The same in the training chain, dr formed there too; kernel after kernel it is a pass before the better of the ways
// from dr to dw_pw.
inline SeparableWgradPlan plan_chain_wgrad(const ConvShape& c, int c_out, int element_bytes, bool aligned,
                                           const DeviceProperties& device) {
  if (c.r != 3 || c.stride_h != 1) return {};
  SeparableWgradPlan plan = detail::plan_wgrad(c, c_out, element_bytes, aligned, WgradUpstream::kRawOutput, device);
  const SeparableWgradPlan from_dr = plan_separable_wgrad(c, c_out, element_bytes, aligned, device);
  plan.staged_clocks =
      detail::raw_gradient_clocks(c, c_out, device) + (pays(from_dr) ? from_dr.clocks : from_dr.staged_clocks);
  return plan;
}

}  // namespace xsep::cuda
