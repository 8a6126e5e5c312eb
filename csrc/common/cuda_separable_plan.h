// How the fused separable forward is cut into tiles of pixels, and what it keeps in shared memory.
#pragma once

#include <limits>

#include "cuda_clocks.h"
#include "cuda_plan.h"
#include "divisor.h"

namespace xsep::cuda {

// A CTA walks over tiles: row_warps * kWarpPixels pixels of y, all output channels, which its warps share out in blocks
// of kWarpPixels x kWarpChannels. A tile's pixels are tile_rows x tile_columns; where the pictures are small, a row of
// the tile may belong to the next picture, so that small maps fill the tile too.
inline constexpr int kWarpPixels = 64;
inline constexpr int kWarpChannels = 64;
inline constexpr int kMostChannelWarps = 4;
// Of a CTA, and with 255 registers a thread of a multiprocessor.
inline constexpr int kMostFusedWarps = 8;
inline constexpr int kFusedThreads = 32 * kMostFusedWarps;
static_assert(kMostFusedWarps >= kMostChannelWarps, "one CTA holds all of C_out");

// z is made in strips of neighbouring pixels: in float32 by threads, each for kFusedVectorBytes of channels; in 16 bits
// by warps on tensor cores, for up to as many rows of one picture as a group has.
inline constexpr int kFusedStripWidth = 8;
inline constexpr int kFusedVectorBytes = 8;
inline constexpr int kFusedGroupRows = 4;
// A block of these is a word: its first strip in the tile, the pixel of the halo at its first tap, its rows.
inline constexpr int kFusedStripBits = 9, kFusedHaloBits = 14, kFusedRowsBits = 3;
static_assert(kMostFusedWarps * kWarpPixels <= 1 << kFusedStripBits, "a strip has a pixel");
static_assert(kFusedGroupRows < 1 << kFusedRowsBits);

// ldmatrix reads 16 bytes of 8 neighbouring pixels of x: with so much behind each they lie in different banks.
inline constexpr int kFusedPixelMargin = 16;
// Weights of this many channels follow the last one's, all zeros: what a tensor core's lanes beside the diagonal read.
inline constexpr int kFusedZeroChannels = 16;

// Buffers for x: while one is read, the others are on their way.
inline constexpr int kMostHalos = 4;
inline constexpr int kFusedTileBytes = 7 * 4;
// A tile's statistics are added up where a chunk of z was: for each block of pixels two floats a channel, and one more.
static_assert(3 * kWarpChannels * kMostChannelWarps * 4 <= kWarpPixels * 64, "with one block of pixels, in 64 bytes");
static_assert(2 * kWarpChannels * kMostChannelWarps * 4 <= kWarpPixels * 64, "and with each that is added");

// Where the buffers start in shared memory; separable/tile.cuh says what they hold. Part of the plan, so that a kernel
// finds them in its parameters and need not keep them in registers.
struct FusedLayout {
  int halo, operand, z;  // several buffers each
  int taps, vectors, source, slot, block, tile, place, z_place, affine;
};

struct SeparablePlan {
  bool fused;       // else staged: the depthwise kernel, then a GEMM
  bool keeps_w_pw;  // all of it in shared memory; else each chunk is loaded again for every tile
  int chunk_bytes;  // 64 or 128: what one pipeline step takes of a pixel's channels
  int chunk_log2;   // 6 or 7
  int pixel_bytes;  // from one pixel of x to the next, in a buffer
  int row_warps;    // warps along the pixels
  int row_warps_log2;
  int channel_warps;  // and along the output channels
  int warps;          // of a CTA
  int pixels;         // of a tile, at most
  int tile_rows, tile_columns;
  int strips;                        // of kFusedStripWidth pixels across a tile
  int group_rows;                    // rows that tiles may run across: one picture's P, or all N P
  int tiles_of_group, tiles_across;  // tiles down a group and across
  int tiles;                         // also rows of the statistics
  int workers;                       // CTAs that share the tiles
  int halo_rows, halo_columns;       // pixels of x under a tile
  int halo_pitch;                    // halo_columns, up to whole strips
  int halos;                         // buffers for x
  int maps;                          // of tiles that are under way at a time
  int z_rows;                        // a tile's pixels, up to whole blocks
  int operand_rows;                  // of what z is multiplied by: of w_pw C_out, up to whole runs of columns
  int operand_buffers;               // for it: of w_pw one for each chunk, or 2
  int table_channels;                // C_in, up to whole chunks
  int tap_words;                     // of the depthwise weights' table
  int chunks;
  // Where a tile lies and what is under it is found by divisions.
  Divisor by_tiles_across, by_tiles_of_group, by_picture_rows, by_picture_halo, by_halo_pitch, by_strips, by_warps;
  FusedLayout layout;
  int shared_bytes;
  double clocks;  // that it should take, as fused_clocks has it
};

namespace detail {

inline constexpr int64_t kMost = std::numeric_limits<int>::max();

// Words for the blocks of a tile: of one row at the least, and one more, as they go in pairs.
XSEP_HOST_DEVICE constexpr int blocks_of(const SeparablePlan& plan) { return plan.tile_rows * plan.strips + 1; }

// Words that hold a column of taps, which are read 16 bytes at a time.
constexpr int diagonal_taps(int k) { return ceil_div(k, 4) * 4; }

// For so many buffers for x, and for what z is multiplied by.
inline void lay_out_shared_memory(SeparablePlan& plan, int halos, int operand_buffers) {
  plan.halos = halos, plan.operand_buffers = operand_buffers, plan.keeps_w_pw = operand_buffers == plan.chunks;
  // From the step that is multiplied to the one behind the newest copy, which is being prepared.
  plan.maps = ceil_div(halos + 1, plan.chunks) + 1;
  const int channels = plan.channel_warps * kWarpChannels;
  plan.shared_bytes = 0;
  const auto take = [&](int bytes, int count = 1) {
    const int place = plan.shared_bytes;
    plan.shared_bytes += count * shared_bytes_of(bytes);
    return place;
  };
  plan.layout.halo = take(plan.halo_rows * plan.halo_pitch * plan.pixel_bytes, plan.halos);
  plan.layout.operand = take(plan.operand_rows * plan.chunk_bytes, plan.operand_buffers);
  plan.layout.z = take(plan.z_rows * plan.chunk_bytes, 2);
  plan.layout.taps = take(plan.tap_words * 4);
  plan.layout.vectors = take(4 * plan.table_channels * 4);
  plan.layout.source = take(plan.maps * plan.halo_rows * plan.halo_pitch * 4);
  plan.layout.slot = take(plan.maps * plan.tile_rows * 4);
  plan.layout.block = take(plan.maps * blocks_of(plan) * 4);
  plan.layout.tile = take(plan.maps * kFusedTileBytes);
  plan.layout.place = take(plan.pixels * 4);
  plan.layout.z_place = take(plan.tile_rows * plan.strips * kFusedStripWidth * 4);
  plan.layout.affine = take(2 * channels * 4);
}

// Fills in what follows from chunk_bytes, row_warps, tile_columns and group_rows; false where the kernel could not
// count so far.
inline bool complete_fused_plan(SeparablePlan& plan, const ConvShape& c, int c_out, int element_bytes) {
  plan.fused = true;
  plan.chunk_log2 = plan.chunk_bytes == 128 ? 7 : 6;
  plan.pixel_bytes = plan.chunk_bytes + (element_bytes == 2 ? kFusedPixelMargin : 0);
  plan.channel_warps = ceil_div(c_out, kWarpChannels);
  while (1 << plan.row_warps_log2 < plan.row_warps) ++plan.row_warps_log2;
  plan.warps = plan.row_warps * plan.channel_warps;
  plan.pixels = plan.row_warps * kWarpPixels;
  plan.tile_rows = std::min(plan.pixels / plan.tile_columns, plan.group_rows);
  const int groups = plan.group_rows == c.p ? c.n : 1;
  plan.tiles_of_group = ceil_div(plan.group_rows, plan.tile_rows);
  plan.tiles_across = ceil_div(c.q, plan.tile_columns);
  const int64_t tiles = static_cast<int64_t>(groups) * plan.tiles_of_group * plan.tiles_across;
  plan.tiles = static_cast<int>(std::min(tiles, kMost));
  const int pictures = plan.group_rows == c.p ? 1 : std::min(plan.tile_rows, ceil_div(plan.tile_rows - 1, c.p) + 1);
  plan.halo_rows = plan.tile_rows * c.stride_h + pictures * (c.r - c.stride_h);
  plan.halo_columns = (plan.tile_columns - 1) * c.stride_w + c.s;
  plan.strips = ceil_div(plan.tile_columns, kFusedStripWidth);
  plan.halo_pitch = (plan.strips * kFusedStripWidth - 1) * c.stride_w + c.s;
  // It counts in 32 bits: tiles, and a little past the last; and from a tile's first pixel, in y and in x.
  const int64_t reach_y = static_cast<int64_t>(plan.tile_rows) * c.q * c_out;
  const int64_t rows_x = static_cast<int64_t>(pictures - 1) * c.h + plan.halo_rows;
  if (tiles > kMostTiles || reach_y > kMost || rows_x > kMost / c.w / c.c_in) return false;
  if (plan.halo_rows * plan.halo_pitch > 1 << kFusedHaloBits) return false;
  const int chunk = plan.chunk_bytes / element_bytes;
  plan.chunks = ceil_div(c.c_in, chunk);
  plan.table_channels = plan.chunks * chunk;
  plan.tap_words = element_bytes == 2 ? (plan.table_channels + kFusedZeroChannels) * c.s * diagonal_taps(c.r)
                                      : plan.table_channels * c.s * c.r;
  plan.z_rows = ceil_div(plan.tile_rows * plan.tile_columns, kWarpPixels) * kWarpPixels;
  plan.operand_rows = ceil_div(c_out, 32) * 32;
  plan.by_tiles_across = divisor_of(plan.tiles_across), plan.by_tiles_of_group = divisor_of(plan.tiles_of_group);
  plan.by_picture_rows = divisor_of(c.p), plan.by_picture_halo = divisor_of((c.p - 1) * c.stride_h + c.r);
  plan.by_halo_pitch = divisor_of(plan.halo_pitch), plan.by_strips = divisor_of(plan.strips);
  plan.by_warps = divisor_of(plan.warps);
  return true;
}

// Takes as many buffers for x as fit, beside all of w_pw if that fits too; false where not even the least does.
inline bool fit_into_shared_memory(SeparablePlan& plan, int limit) {
  const auto fits = [&](int halos, int operand_buffers) {
    lay_out_shared_memory(plan, halos, operand_buffers);
    return plan.shared_bytes <= limit;
  };
  for (int halos = kMostHalos; halos >= 2; --halos) {
    if (fits(halos, plan.chunks)) return true;
  }
  // What is loaded again and again comes with the copy of x before it is needed, which is then one step ahead.
  return plan.chunks > 2 && fits(2, 2);
}

// CTAs that are resident on a multiprocessor. It has 1 KB more than one CTA can have, and each CTA takes 1 KB itself.
inline int resident_ctas(const SeparablePlan& plan, const DeviceProperties& device) {
  constexpr int kReserved = 1024;
  const int by_memory = (device.shared_bytes_per_cta + kReserved) / (plan.shared_bytes + kReserved);
  return std::max(1, std::min(kMostFusedWarps / plan.warps, by_memory));
}

// What a step of a plan takes of a multiprocessor.
struct StepWork {
  double instructions;   // of threads
  double shared_bytes;   // read and written, of shared memory
  double multiply_adds;  // of tensor cores, zeros too
  double alone;          // clocks that the warp with the most to do needs if nobody is in its way
};

// Of z, by threads in float32.
inline StepWork strips_work(const SeparablePlan& plan, const ConvShape& c, int element_bytes) {
  const int threads = 32 * plan.warps;
  const int strips = plan.tile_rows * plan.strips;
  const int turns = ceil_div(strips * plan.chunk_bytes / kFusedVectorBytes, threads);
  // A strip: for each row of taps its weights, then each pixel of x loaded and multiplied.
  const int vec = kFusedVectorBytes / element_bytes, loads = (kFusedStripWidth - 1) * c.stride_w + c.s;
  const double strip = c.r * (c.s + loads + kFusedStripWidth * c.s * vec + 11) + 140;
  const double read = strips * static_cast<double>(plan.chunk_bytes) * c.r * (loads + c.s);
  return {threads * turns * strip, read, 0.0, 0.0};
}

// Of z, by warps on tensor cores.
inline StepWork diagonal_work(const SeparablePlan& plan, const ConvShape& c) {
  const int pictures = plan.group_rows == c.p ? 1 : ceil_div(plan.tile_rows, c.p);
  const int groups = pictures * ceil_div(ceil_div(plan.tile_rows, pictures), kFusedGroupRows);
  const int pairs = ceil_div(groups * plan.strips, 2);  // of blocks
  const int eights = pairs * plan.chunk_bytes / 16, share = ceil_div(eights, plan.warps);
  const int row_pairs = ((kFusedGroupRows - 1) * c.stride_h + c.r + 1) / 2;
  const double mma = 1.0 * kFusedGroupRows * c.r * c.s, ldmatrix = 1.0 * c.s * row_pairs;
  const double weights = 1.0 * c.s * diagonal_taps(c.r) / 4;
  // Beside an eight's own, what a warp finds out of its pair. Of mma, four run beside each other, each some 33 clocks
  // long.
  const double eight = mma + ldmatrix + weights + 60, pair = 110;
  const double runs = std::max(pairs, ceil_div(eights, share));
  return {32.0 * (eights * eight + runs * pair), eights * (512 * ldmatrix + 256 * weights + 1024.0),
          eights * mma * 1024, share * (mma / 4 * 33 + 50.0)};
}

// What a plan should cost, in clocks of the busiest multiprocessor: instructions as counted in the compiled kernel,
// what shared memory and tensor cores do in a clock, a multiprocessor's share of L2, and the latency of memory. Plans
// of one problem are compared by it, and xsep/plans.py holds the fused kernel against other ways; no card has confirmed
// it.
inline double fused_clocks(const SeparablePlan& plan, const ConvShape& c, int c_out, int element_bytes,
                           const DeviceProperties& device) {
  constexpr double kLanes = 128.0, kLatency = 1000.0, kBarrier = 60.0, kSharedBytesAClock = 128.0;
  const int units = plan.chunk_bytes / 16;
  const StepWork z = element_bytes == 2 ? diagonal_work(plan, c) : strips_work(plan, c, element_bytes);
  // Two steps of mma, 32 bytes of the chunk; and from accumulators to y.
  const double multiply = plan.chunk_bytes / 32.0 * (c_out > 32 ? 52 : 30), finish = 400;
  const int blocks = plan.channel_warps * (plan.z_rows / kWarpPixels);
  const double x_pieces = units * plan.halo_rows * plan.halo_pitch;
  const double w_pieces = plan.keeps_w_pw ? 0.0 : units * plan.operand_rows;
  const double mapped = plan.halo_rows * plan.halo_pitch * 60.0;
  const double instructions = z.instructions + 32 * blocks * multiply + x_pieces * 14 + w_pieces * 40;
  const double of_blocks = blocks * static_cast<double>(kWarpPixels + kWarpChannels) * plan.chunk_bytes;
  const double shared_bytes = z.shared_bytes + of_blocks + 16 * (x_pieces + w_pieces);
  const double multiply_adds = z.multiply_adds + static_cast<double>(plan.z_rows) * plan.operand_rows *
                                                     plan.chunk_bytes / element_bytes * (element_bytes == 4 ? 2 : 1);
  const double step = instructions / kLanes + kBarrier;
  const double last = (32 * blocks * finish + mapped) / kLanes;
  // A scheduler that has but one warp is idle about every second clock.
  const int rounds = ceil_div(plan.tiles, device.multiprocessors);
  const int together = std::min(rounds, resident_ctas(plan, device));
  const double alone = std::max(1.0, static_cast<double>(kMostFusedWarps) / (plan.warps * together));
  const double waits = kLatency / ((plan.halos - 1) * together);
  const double issuing = step * alone, sharing = shared_bytes / kSharedBytesAClock;
  const double multiplying = multiply_adds / kMmaSyncMultiplyAdds,
               loading = 16 * (x_pieces + w_pieces) / kL2BytesAClock;
  constexpr double kAlongside = 0.02;  // of what is not the longest, so that less of it is better
  const double a_step = std::max({issuing, sharing, multiplying, loading, waits, z.alone + multiply * 4}) +
                        kAlongside * (issuing + sharing + multiplying + loading);
  return rounds * (plan.chunks * a_step + last * alone);
}

// Calls f(columns) for widths of a tile of so many pixels: rows in equal parts, each width about a tenth less than the
// one before, and the same up to whole strips.
template <class Function>
void for_each_width(int q, int pixels, Function f) {
  const int most = std::min(q, pixels);
  for (int width = most; width >= std::min(most, kFusedStripWidth);) {
    const int columns = ceil_div(q, ceil_div(q, width));
    const int strips = std::min(ceil_div(columns, kFusedStripWidth) * kFusedStripWidth, most);
    f(columns);
    if (strips != columns) f(strips);
    width = std::min(columns - 1, columns * 9 / 10);
  }
}

}  // namespace detail

// Fused where one CTA can hold all of C_out, so that z is computed once. Of the ways to cut y into tiles, the one that
// should take the least time.
inline SeparablePlan plan_separable_fprop(const ConvShape& c, int c_out, int element_bytes, bool aligned,
                                          const DeviceProperties& device) {
  SeparablePlan best{};
  const bool filter = c.r == c.s && (c.r == 3 || c.r == 5) && detail::has_sliding_window(c);
  const int64_t rows = static_cast<int64_t>(c.n) * c.p;
  // So many channels' weights do not fit, and their bytes would pass what an int holds.
  const bool tables = c.c_in <= device.shared_bytes_per_cta;
  if (!aligned || !filter || !tables || rows > detail::kMost || static_cast<int64_t>(c.n) * c.h > detail::kMost ||
      c.c_in % (16 / element_bytes) != 0 || c_out % (16 / element_bytes) != 0 ||
      c_out > kWarpChannels * kMostChannelWarps) {
    return best;
  }
  const auto consider = [&](int chunk_bytes, int row_warps, int columns, bool across_pictures) {
    SeparablePlan plan{};
    plan.chunk_bytes = chunk_bytes, plan.row_warps = row_warps, plan.tile_columns = columns;
    plan.group_rows = across_pictures ? static_cast<int>(rows) : c.p;
    if (!detail::complete_fused_plan(plan, c, c_out, element_bytes)) return;
    if (!detail::fit_into_shared_memory(plan, device.shared_bytes_per_cta)) return;
    plan.clocks = detail::fused_clocks(plan, c, c_out, element_bytes, device);
    if (!best.fused || plan.clocks < best.clocks) best = plan;
  };
  for (const int chunk_bytes : {128, 64}) {
    for (int row_warps = kMostFusedWarps; row_warps >= 1; row_warps /= 2) {
      if (row_warps * ceil_div(c_out, kWarpChannels) > kMostFusedWarps) continue;
      detail::for_each_width(c.q, row_warps * kWarpPixels, [&](int columns) {
        for (const bool across_pictures : {false, true}) consider(chunk_bytes, row_warps, columns, across_pictures);
      });
    }
  }
  if (best.fused) {
    best.workers = std::min(best.tiles, device.multiprocessors * detail::resident_ctas(best, device));
  }
  return best;
}

}  // namespace xsep::cuda
