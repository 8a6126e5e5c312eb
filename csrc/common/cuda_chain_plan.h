// How the CUDA kernels of the training chain that do no convolution are cut, and a layer's backward into slices of the
// batch: pure functions, as in cuda_plan.h.
#pragma once

#include "cuda_plan.h"

namespace xsep::cuda {

inline constexpr int kImageThreads = 256;

// CTAs a multiprocessor gets: of a kernel that only maps pixels, of which registers let 3 or 4 be resident, and of one
// whose CTAs leave a partial sum each.
inline constexpr int kMapCtasPerSm = 12;
inline constexpr int kSumCtasPerSm = 4;

// Pixels of a tile of the statistics; xsep/backends/chain.py says the same to traced code.
inline constexpr int kStatisticsPixels = 128;

// Images [N, H, W, C] seen as [pixels, C]. A CTA has a slice of the channels; its threads lie over vectors of them
// (fastest, so that accesses are coalesced), then over pixels.
struct ImagePlan {
  int vec;      // channels a thread: 16 bytes of them, or one
  int vectors;  // vectors a CTA
  int slices;   // CTAs side by side along the channels
  int lanes;    // pixels a CTA has under its threads at a time
  int workers;  // CTAs that share the pixels of a slice
};

// aligned: every tensor starts on a 16-byte boundary.
inline ImagePlan plan_images(int64_t pixels, int channels, int element_bytes, bool aligned, int ctas_per_sm,
                             const DeviceProperties& device) {
  ImagePlan plan{};
  const int vec = 16 / element_bytes;
  plan.vec = aligned && channels % vec == 0 ? vec : 1;
  plan.vectors = detail::vectors_of_a_cta(channels / plan.vec, 64);
  plan.slices = ceil_div(channels / plan.vec, plan.vectors);
  plan.lanes = kImageThreads / plan.vectors;
  const int64_t turns = (pixels + plan.lanes - 1) / plan.lanes;
  const int64_t wanted = std::max(1, device.multiprocessors * ctas_per_sm / plan.slices);
  plan.workers = static_cast<int>(std::max<int64_t>(1, std::min(turns, wanted)));
  return plan;
}

// Tiles of the statistics that come with a depthwise forward: what one CTA walks over, or behind the general kernel
// kStatisticsPixels each.
inline int64_t fprop_statistics_tiles(const DepthwisePlan& plan, const ConvShape& c) {
  const int64_t pixels = static_cast<int64_t>(c.n) * c.p * c.q;
  return plan.sliding_window ? plan.workers : (pixels + kStatisticsPixels - 1) / kStatisticsPixels;
}

// Pixels that one CTA of the sliding window walks over, at most.
inline int64_t most_pixels_of_a_worker(const DepthwisePlan& plan, const ConvShape& c) {
  const int64_t tiles = static_cast<int64_t>(c.n) * plan.tiles_down * plan.tiles_across;
  return (tiles + plan.workers - 1) / plan.workers * plan.strips_down * plan.strips_across * plan.strip_rows *
         kStripWidth;
}

// CTAs along the tiles that merge statistics: enough to read them at speed, few enough for one thread a channel to add
// them up.
inline int merge_groups(int64_t tiles) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(64, (tiles + 31) / 32)));
}

// Pictures of a slice of a layer's forward or backward: r or dr, and z or dz, of so many stay in half of L2 between the
// kernels that write and read them; but enough pictures to fill the card with tiles of a GEMM.
inline int plan_chain_slice(const ConvShape& c, int c_out, int element_bytes, const DeviceProperties& device) {
  const int64_t pixels = static_cast<int64_t>(c.p) * c.q;
  const int64_t picture = std::max<int64_t>(1, pixels * (static_cast<int64_t>(c_out) + c.c_mid) * element_bytes);
  const int64_t tiles = std::max<int64_t>(1, (pixels + 127) / 128 * ((c.c_mid + 127) / 128));
  const int64_t fitting = device.l2_bytes / 2 / picture;
  const int64_t filling = (2 * static_cast<int64_t>(device.multiprocessors) + tiles - 1) / tiles;
  const int64_t most = std::max(fitting, filling);
  // None more than one picture smaller than another.
  const int64_t slices = (c.n + most - 1) / std::max<int64_t>(1, most);
  return static_cast<int>(std::max<int64_t>(1, (c.n + slices - 1) / std::max<int64_t>(1, slices)));
}

}  // namespace xsep::cuda
