// How the CUDA kernels of the training chain that do no convolution are cut, and a layer's backward into slices of the
// batch or into the tiles of one pass: pure functions, as in cuda_plan.h.
#pragma once

#include "cuda_clocks.h"
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

namespace detail {

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

}  // namespace detail

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

// CTAs along the tiles that merge statistics: so many that each thread has its few tiles' on their way at once, few
// enough for one CTA to add them up.
inline int merge_groups(int64_t tiles) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(128, (tiles + 31) / 32)));
}

inline constexpr int kStagedKernels = 6;        // dr, z, dw_pw, its sum over the slices, dz, dx
inline constexpr double kHostClocks = 17500.0;  // 10 us in which Python enqueues one, at best

// A staged layer's backward, kernel by kernel; its forward has half as many kernels, and half as much to save.
struct StagedBackward {
  double fresh_bytes;   // a picture: du, r, x twice, dx
  double reused_bytes;  // dr written once and read twice, z and dz written and read

  StagedBackward(const ConvShape& c, int c_out, int element_bytes) {
    const double of_outputs = static_cast<double>(c.p) * c.q * element_bytes;
    const double of_x = static_cast<double>(c.h) * c.w * c.c_in * element_bytes;
    fresh_bytes = of_outputs * 2 * c_out + 3 * of_x;
    reused_bytes = of_outputs * (3.0 * c_out + 4.0 * c.c_mid);
  }

  // For all kernels of so many pictures, a slice of them or all.
  double clocks(int pictures, bool in_l2, const DeviceProperties& device) const {
    const double reused = reused_bytes / (in_l2 ? kL2BytesAClock : kMemoryBytesAClock);
    return pictures * (fresh_bytes / kMemoryBytesAClock + reused) / device.multiprocessors;
  }
};

// How a staged layer goes over the batch, and what that should cost its backward.
struct ChainSlice {
  int pictures;  // at a time
  double clocks;
};

// Slices whose r or dr, and z or dz, stay in half of L2 between the kernels that write and read them; or all pictures
// at once, where slices cost more in launches than they save, or where the host would take longer to enqueue a slice's
// kernels than the card to run them. With the constants above no card of less than about 110 MB of L2 has slices.
inline ChainSlice weigh_chain_slice(const ConvShape& c, int c_out, int element_bytes, const DeviceProperties& device) {
  const StagedBackward backward(c, c_out, element_bytes);
  const int n = std::max(1, c.n);
  const int64_t pixels = static_cast<int64_t>(c.p) * c.q;
  const int64_t bytes = std::max<int64_t>(1, pixels * (static_cast<int64_t>(c_out) + c.c_mid) * element_bytes);
  const int64_t fitting = std::min<int64_t>(n, device.l2_bytes / 2 / bytes);
  const ChainSlice whole{n, backward.clocks(n, fitting == n, device) + kStagedKernels * kLaunchClocks};
  if (fitting < 1 || fitting == n) return whole;
  const int slices = ceil_div(n, static_cast<int>(fitting));
  const ChainSlice sliced{ceil_div(n, slices),  // none more than one picture smaller than another
                          backward.clocks(n, true, device) + slices * kStagedKernels * kLaunchClocks};
  // Two tiles of a GEMM for each multiprocessor, and the host's time.
  const int64_t tiles = (pixels + 127) / 128 * ((c.c_mid + 127) / 128) * sliced.pictures;
  const bool busy = tiles >= 2 * static_cast<int64_t>(device.multiprocessors) &&
                    backward.clocks(sliced.pictures, true, device) >= kStagedKernels * kHostClocks;
  return busy && sliced.clocks < whole.clocks ? sliced : whole;
}

inline int plan_chain_slice(const ConvShape& c, int c_out, int element_bytes, const DeviceProperties& device) {
  return weigh_chain_slice(c, c_out, element_bytes, device).pictures;
}

// A layer's backward in one pass: a CTA forms dr, z, dz and dx of one tile of pixels after the other in shared memory.
// Its threads are one wave of the card: registers hold all of dw_pw and dw_dw from a CTA's first tile to its last.
inline constexpr int kChainTileColumns = 16;  // one step of mma along the pixels
inline constexpr int kChainVec = 2;           // channels a thread of the depthwise steps
inline constexpr int kChainThreads = 512;
inline constexpr int kChainWarps = kChainThreads / 32;
inline constexpr int kChainBlock = 32;  // pixels or channels of a warp's block of a product, both ways
inline constexpr int kMostChainChannels = 128;
static_assert((kMostChainChannels / kChainBlock) * (kMostChainChannels / kChainBlock) <= kChainWarps,
              "every block of dw_pw has a warp");
inline constexpr int kFewestChainRows = 4;  // with fewer, about half of what is read would be halo
inline constexpr int kMostChainRows = 16;

// Whole blocks of channels of 2 bytes, and 16 bytes more: an odd number of ldmatrix's units, so that the 8 rows that it
// reads lie in different banks.
constexpr int chain_pitch(int blocks) { return blocks * kChainBlock * 2 + 16; }
static_assert(chain_pitch(1) / 16 % 2 == 1 && chain_pitch(2) / 16 % 2 == 1, "an odd number of units");

struct ChainBackwardLayout {
  int dr, x, z, dz, w_pw, taps, affines, coef;
};

struct ChainBackwardPlan {
  bool fused;                    // the kernel is made for it; whether it pays is told by the clocks
  int tile_rows;                 // of kChainTileColumns pixels
  int halo_pixels;               // of a tile and its border of one pixel
  int tiles_down, tiles_across;  // a picture
  int tiles;                     // of all pictures
  int workers;                   // CTAs that share them
  int blocks_in, blocks_out;     // kChainBlock channels each; the last may be padded
  int shares;                    // warps that share the pixels of one block of dw_pw
  int pitch_in, pitch_out;       // bytes from one pixel's channels to the next pixel's
  int dr_bytes;                  // of the buffer that holds dr, and in the end the sums
  ChainBackwardLayout layout;
  int shared_bytes;
  // That one pass should take, and a kernel after the other, through memory; z on the chip would save of the latter.
  double clocks, staged_clocks;
};

namespace detail {

inline void lay_out_shared_memory(ChainBackwardPlan& plan, int c_in, int c_out) {
  plan.shared_bytes = 0;
  const auto take = [&](int bytes) {
    const int place = plan.shared_bytes;
    plan.shared_bytes += shared_bytes_of(bytes);
    return place;
  };
  // In the end a filter row of every thread's sums takes the place of dr.
  constexpr int kSums = 3 * kChainVec * kChainThreads * 4;
  plan.dr_bytes = std::max(kSums, plan.halo_pixels * plan.pitch_out);
  plan.layout.dr = take(plan.dr_bytes);
  plan.layout.x = take(plan.halo_pixels * plan.pitch_in);
  plan.layout.z = take(plan.tile_rows * kChainTileColumns * plan.pitch_in);
  plan.layout.dz = take(plan.halo_pixels * plan.pitch_in);
  plan.layout.w_pw = take(plan.blocks_out * kChainBlock * plan.pitch_in);
  plan.layout.taps = take(9 * c_in * 4);
  plan.layout.affines = take((2 + kMostGradientSums - 1) * c_in * 4);
  plan.layout.coef = take(3 * c_out * 4);
}

// Instructions of threads, for each pixel of a tile's halo or its own and each channel, or each product of two: fitted
// to what tests/cuda/counted.py counts in the compiled kernel for four layers, to 1 %.
inline constexpr double kHaloPerOutput = 8.1, kHaloPerInput = 12.0, kOwnPerInput = 83.2, kPerProduct = 0.063;

// What one pass should cost, in clocks of the busiest multiprocessor: its instructions and the latency of the loads
// that a tile begins with, or memory. No card has measured it.
inline double chain_backward_clocks(const ChainBackwardPlan& plan, const ConvShape& c, int c_out, int element_bytes) {
  constexpr double kLanes = 128.0, kLatency = 1000.0, kBarriers = 3 * 60.0;
  const double halo = plan.halo_pixels, own = plan.tile_rows * kChainTileColumns;
  const double products = static_cast<double>(c.c_in) * c_out;
  const double instructions = halo * (kHaloPerOutput * c_out + kHaloPerInput * c.c_in + kPerProduct * products) +
                              own * (kOwnPerInput * c.c_in + kPerProduct * products);
  const auto turns = [&](int blocks) {  // of a thread over the halo, a unit of 8 channels each
    return ceil_div(plan.halo_pixels, kChainThreads / (blocks * (kChainBlock / 8)));
  };
  const double latency = kLatency * (turns(plan.blocks_out) + turns(plan.blocks_in));
  // du, r and x with halo, x again and dx.
  const double bytes = element_bytes * (halo * (2.0 * c_out + c.c_in) + own * 2.0 * c.c_in);
  const double tile = std::max(instructions / kLanes + latency + kBarriers, bytes / kMemoryBytesAClock);
  constexpr int kKernels = 3;  // it, and the second stage of two kinds of sums
  return ceil_div(plan.tiles, plan.workers) * tile + kKernels * kLaunchClocks;
}

}  // namespace detail

// In one pass where the channels allow it; whether that is expected to be faster than kernel by kernel is for the
// caller to see, who may have other reasons.
inline ChainBackwardPlan plan_chain_backward(const ConvShape& c, int c_out, int element_bytes, bool aligned,
                                             const DeviceProperties& device) {
  const ChainBackwardPlan staged{};
  const bool filter = c.r == 3 && c.s == 3 && c.stride_h == 1 && c.stride_w == 1 && c.dilation_h == 1 &&
                      c.dilation_w == 1 && c.pad_top == 1 && c.pad_left == 1 && c.p == c.h && c.q == c.w;
  const bool channels =
      c.c_mid == c.c_in && c.c_in % 8 == 0 && c_out % 8 == 0 && std::max(c.c_in, c_out) <= kMostChainChannels;
  if (!aligned || element_bytes != 2 || !filter || !channels || c.n < 1) return staged;
  ChainBackwardPlan best = staged;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (int rows = kFewestChainRows; rows <= kMostChainRows; ++rows) {
    ChainBackwardPlan plan{};
    plan.fused = true;
    plan.tile_rows = rows;
    plan.halo_pixels = (rows + 2) * (kChainTileColumns + 2);
    plan.tiles_down = ceil_div(c.h, rows);
    plan.tiles_across = ceil_div(c.w, kChainTileColumns);
    const int64_t tiles = static_cast<int64_t>(c.n) * plan.tiles_down * plan.tiles_across;
    // The kernel counts pixels and channels of one picture's tile in 32 bits.
    const int64_t reach = static_cast<int64_t>(rows + 2) * c.w * std::max(c.c_in, c_out);
    if (tiles > detail::kMostTiles || reach > std::numeric_limits<int>::max()) continue;
    plan.tiles = static_cast<int>(tiles);
    plan.workers = std::min(plan.tiles, device.multiprocessors);
    plan.blocks_in = ceil_div(c.c_in, kChainBlock), plan.blocks_out = ceil_div(c_out, kChainBlock);
    plan.pitch_in = chain_pitch(plan.blocks_in), plan.pitch_out = chain_pitch(plan.blocks_out);
    plan.shares = kChainWarps / (plan.blocks_in * plan.blocks_out);
    detail::lay_out_shared_memory(plan, c.c_in, c_out);
    if (plan.shared_bytes > device.shared_bytes_per_cta) break;
    // What all tiles multiply, and about what they read.
    const int64_t work = tiles * ceil_div(plan.halo_pixels, kChainBlock);
    if (work < fewest) best = plan, fewest = work;
  }
  if (best.fused) {
    best.clocks = detail::chain_backward_clocks(best, c, c_out, element_bytes);
    best.staged_clocks = weigh_chain_slice(c, c_out, element_bytes, device).clocks;
  }
  return best;
}

}  // namespace xsep::cuda
