// How a problem is cut into tasks on a CPU: pure functions of the problem, the threads and the cache.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

#include "geometry.h"

namespace xsep {

/// Columns of one packed panel of the pointwise weights: what one GEMM call multiplies by.
constexpr int64_t kPanelColumns = 64;

/// The z tile may take this much, or half of the second-level cache where that is less: every tile streams all the
/// packed weights, so few large ones read least.
constexpr int64_t kMaxTileBytes = 512 * 1024;

inline int64_t tile_budget(int64_t l2_bytes) { return std::min(kMaxTileBytes, l2_bytes / 2); }

/// All of z, where it is made before anything is multiplied: to stay in a share of the third-level cache.
constexpr int64_t kMaxWholeZBytes = 4 * 1024 * 1024;
/// And how much of it is multiplied by a panel at a time.
constexpr int64_t kZFirstTilePixels = 126;

/// A matrix product of NHWC pixels by panels of output channels: tiles of pixels that stay in the second-level cache
/// for all the panels of a group. No tile is larger than another by more than a block of the product.
struct CpuTilePlan {
  int64_t pixels;
  int64_t tile_pixels;  // of the largest tile
  int64_t tiles;
  int64_t panels;  // of kPanelColumns output channels
  int64_t
      panel_groups;  // tasks that share a tile, in the separable forward each with its own z; 1 unless tiles are few
  bool z_first;      // all of z is made first, then a task is a panel and all the tiles
  int64_t tasks() const { return z_first ? panels : tiles * panel_groups; }
  Range group_panels(int64_t group) const {
    return {panels * group / panel_groups, panels * (group + 1) / panel_groups};
  }
  Range tile(int64_t i) const {
    const int64_t rows = block(tile_pixels), blocks = ceil_div(pixels, rows);
    return {blocks * i / tiles * rows, std::min(blocks * (i + 1) / tiles * rows, pixels)};
  }
  /// Pixels that a product's block takes at once, of a tile of so many.
  static int64_t block(int64_t tile_pixels) { return tile_pixels % 6 == 0 ? 6 : 1; }
};

/// Tiles of at most so many pixels; without groups of panels as many for one thread as for another.
inline CpuTilePlan cut_into_tiles(int64_t pixels, int64_t most, int64_t panels, int64_t groups, int threads) {
  const int64_t rows = CpuTilePlan::block(most), blocks = ceil_div(pixels, rows);
  int64_t tiles = std::max<int64_t>(ceil_div(pixels, most), 1);
  if (groups == 1 && tiles > 1) tiles = std::min<int64_t>(round_up(tiles, threads), blocks);
  return {pixels, ceil_div(blocks, tiles) * rows, tiles, panels, groups, false};
}

/// From here on PyTorch's gradients take so long that ours are faster with most lanes idle.
constexpr int64_t kLargeFilter = 25;

/// Whether PyTorch's own two convolutions do better, as measured. Ours hold channels in the lanes of a vector, and one
/// channel, or in a backward two or three of NCHW that are turned round, leave most lanes idle: it is a stride that
/// makes that count, for few outputs and much input. Of few pixels a call is mostly checks and dispatch, which is one
/// where PyTorch's are two. A forward of NCHW goes plane by plane (cpu_separates_planes). training: beside a backward.
inline bool cpu_leaves_lanes_idle(const DepthwiseShape& s, bool nchw, bool training) {
  constexpr int64_t kFewChannels = 3, kLeastPixels = 4096, kManyPixels = 8192;
  if (s.pixels_out() < kLeastPixels || (training ? s.taps() >= kLargeFilter : nchw)) return false;
  if (s.c == 1) return true;
  const bool strided = s.geometry.stride_h > 1 || s.geometry.stride_w > 1;
  return nchw && s.c <= kFewChannels && strided && s.pixels_out() >= kManyPixels;
}

/// The same of bfloat16 in NHWC where a chip multiplies pairs, which PyTorch's convolutions then do, too: measured,
/// over many pixels, and of large filters the forward alone. Outputs so large that the C library maps them anew for
/// each call cost PyTorch more than lanes cost us.
inline bool cpu_pairs_leave_lanes_idle(const DepthwiseShape& s, int64_t c_out, bool nchw, bool training) {
  constexpr int64_t kLanes = 16, kLeastPixels = 32 * 1024, kMappedBytes = 32 * 1024 * 1024;
  if (nchw || s.c == 1 || s.c * s.multiplier >= kLanes) return false;
  if (s.pixels_out() < kLeastPixels || 2 * s.pixels_out() * c_out >= kMappedBytes) return false;
  const bool strided = s.geometry.stride_h > 1 || s.geometry.stride_w > 1;
  return !training || (!strided && s.taps() < kLargeFilter);
}

/// Whether the depthwise forward takes NCHW plane by plane, as it lies, and does not turn it round for vectors that go
/// across channels; lanes is how many a vector has. Measured: few channels would leave lanes idle, the passes of a
/// multiplier would have to be put in order, and beside a small filter the turning is much of the work. In short rows
/// lanes are idle, too, and the weights of a large filter do not stay in registers.
inline bool cpu_takes_planes(const DepthwiseShape& s, bool nchw, int lanes) {
  constexpr int64_t kFewChannels = 16, kLongRow = 48;
  if (!nchw && s.c * s.multiplier > 1) return false;  // one channel lies the same in both layouts
  if (s.multiplier > 1 || (s.c < kFewChannels && s.c % lanes != 0)) return true;
  return s.r <= 3 && s.s <= 3 && s.geometry.stride_h == 1 && s.geometry.stride_w == 1 && s.q >= kLongRow;
}

/// The depthwise forward of NCHW, plane by plane.
struct CpuPlanesPlan {
  int64_t group_rows;  // output rows of one unit
  int64_t row_groups;  // of a plane
  int64_t planes;      // of the input
  int64_t units() const { return planes * row_groups; }
};

/// Rows of outputs whose sums are made together, so that a row of the input is loaded for several of them.
constexpr int kPlaneRows = 4;

/// Elements of a row of the input in a thread's memory that have a phase of the horizontal stride in common: in whole
/// lines.
inline int64_t plane_piece(const DepthwiseShape& s) {
  constexpr int64_t kLine = 16;
  const Geometry& g = s.geometry;
  const int64_t columns = std::max(g.pad_left + s.w, (s.q - 1) * g.stride_w + (s.s - 1) * g.dilation_w + 1);
  return round_up(ceil_div(columns, g.stride_w), kLine);
}

/// Rows of outputs whose rows of the input stay in the first-level cache.
inline int64_t plane_rows_fitting(const DepthwiseShape& s) {
  constexpr int64_t kElements = 16 * 1024 / 4;
  const Geometry& g = s.geometry;
  const int64_t rows = kElements / (g.stride_w * plane_piece(s)), above = (s.r - 1) * g.dilation_h + 1;
  return rows > above ? (rows - above) / g.stride_h + 1 : 1;
}

/// So many rows at most, fewer where there would be too few tasks for the threads, of which each group of rows makes so
/// many.
inline int64_t plane_group_rows(const DepthwiseShape& s, int64_t most, int64_t tasks, int threads) {
  const int64_t parts = tasks >= 4 * threads ? 1 : ceil_div(4 * threads, tasks);
  int64_t group = std::min(most / kPlaneRows * kPlaneRows, round_up(ceil_div(s.p, parts), kPlaneRows));
  group = std::max<int64_t>(group, kPlaneRows);
  return round_up(ceil_div(s.p, ceil_div(s.p, group)), kPlaneRows);  // of about the same size
}

inline CpuPlanesPlan plan_cpu_planes(const DepthwiseShape& s, int threads) {
  const int64_t planes = std::max<int64_t>(s.n * s.c, 1);
  const int64_t group = plane_group_rows(s, plane_rows_fitting(s), planes, threads);
  return {group, ceil_div(s.p, group), planes};
}

/// The fused forward of NCHW, plane by plane.
struct CpuSeparablePlanesPlan {
  int64_t group_rows;  // output rows of one task
  int64_t row_groups;  // of a picture
  int64_t pictures;
  int64_t z_step;  // floats from a plane of z to the next
  int64_t tasks() const { return pictures * row_groups; }
};

/// Rows whose z, of all channels, stays in the second-level cache where that is not less than kPlaneRows.
inline CpuSeparablePlanesPlan plan_cpu_separable_planes(const DepthwiseShape& s, int threads, int64_t l2_bytes) {
  constexpr int64_t kLine = 16;
  const int64_t row_bytes = std::max<int64_t>(4 * s.c * s.multiplier * s.q, 1);
  const int64_t fitting = std::min(plane_rows_fitting(s), tile_budget(l2_bytes) / row_bytes);
  const int64_t group = plane_group_rows(s, fitting, std::max<int64_t>(s.n, 1), threads);
  const int64_t lines = ceil_div(std::min(group, s.p) * s.q, kLine);
  return {group, ceil_div(s.p, group), s.n, (lines | 1) * kLine};  // an odd number: planes of z share no set of a cache
}

/// Whether the fused forward takes NCHW plane by plane, and multiplies in float what chips would else multiply in
/// pairs. Measured: where channels are few, faster by the less of a vector they would fill; with a multiplier, whose
/// passes would else be put in order; and where rows are long and channels so few that turning x and y round is much of
/// the work.
inline bool cpu_separates_planes(const DepthwiseShape& s, bool nchw, bool pairs, int threads, int lanes,
                                 int64_t l2_bytes) {
  constexpr int64_t kFewest = 8, kFewChannels = 16, kSomeChannels = 64, kLongRow = 48;
  if (!nchw) return false;
  const bool dense = s.geometry.stride_h == 1 && s.geometry.stride_w == 1;
  if (s.c < kFewest || (s.c < kFewChannels && (dense || (lanes >= 16 && !pairs)))) return true;
  const bool turning = s.r <= 3 && s.s <= 3 && dense && s.q >= kLongRow && s.c <= kSomeChannels;
  if (pairs || !(s.multiplier > 1 || turning)) return false;
  const CpuSeparablePlanesPlan plan = plan_cpu_separable_planes(s, threads, l2_bytes);
  return plan.tasks() >= threads && 4 * s.c * s.multiplier * plan.z_step <= tile_budget(l2_bytes);
}

/// The same of a depthwise convolution alone, which is one call beside one of PyTorch's: measured, so many channels and
/// from so many pixels on, with so many lanes in a vector. A forward that goes plane by plane leaves none idle.
inline bool cpu_depthwise_leaves_lanes_idle(const DepthwiseShape& s, bool nchw, bool training, int threads, int lanes) {
  const bool planes = cpu_takes_planes(s, nchw, lanes);
  if (planes && !training) return false;
  const bool large_filter = s.taps() >= kLargeFilter, strided = s.geometry.stride_h > 1 || s.geometry.stride_w > 1;
  const int64_t pixels = s.pixels_in() + s.multiplier * s.pixels_out();
  if (s.c == 1) {
    // PyTorch has a way of its own with a small filter over one small picture (use_mkldnn in its
    // ATen/native/Convolution.cpp). oneDNN takes the rest: a multiplier, then no more than a dense convolution, fast,
    // the gradients of a few filters slowly.
    const bool own_way = s.n == 1 && s.pixels_in() <= 20 * 1024 && (s.r <= 3 || s.s <= 3) && !large_filter;
    return own_way || (s.multiplier > 1 && (!training || s.multiplier >= 4));
  }
  // Of NCHW PyTorch shares pictures among threads, we planes or rows.
  if (nchw && threads > s.n) return false;
  const bool turned = (nchw && !planes) || s.multiplier >= 8;  // pixels and channels, or the multiplier's passes
  if (turned && s.c < 8) return pixels >= 24 * 1024 && !(training && large_filter);
  if (large_filter) return false;
  // A backward with a stride reads little and makes much.
  if (strided && training) return s.c <= (nchw ? 16 : 24) && pixels >= 30 * 1024 && !(nchw && lanes >= 16);
  if (strided) return !nchw && s.c <= 24 && pixels >= 60 * 1024;
  // PyTorch takes longer over odd numbers of channels.
  return !nchw && s.c % 2 == 0 && s.c <= (training ? 12 : 4) && pixels >= 48 * 1024;
}

struct CpuDepthwisePlan {
  int64_t run_pixels;  // output pixels of one task
  int64_t tasks;
  int64_t plane_pixels;  // of a task, made before they are turned round to planes of NCHW
};

/// Whether planes of outputs are stored tile by tile. Of a few pixels they would be stored a few values at a time: such
/// an output is turned round as a whole.
inline bool stores_planes(const DepthwiseShape& s) {
  constexpr int64_t kLeastPlane = 64;  // pixels
  return s.p * s.q >= kLeastPlane;
}

/// Rows of the input in a thread's memory, where they are not read as they lie.
struct CpuRowsPlan {
  int64_t slots;    // rows that are there at a time
  int64_t at_once;  // rows brought together
  int64_t columns;  // of a row, with the padding
};

/// Units of the depthwise backward. They depend on the shape alone, so that sums come out the same, bit for bit, on
/// any number of threads.
struct CpuBackwardPlan {
  int64_t group_rows;      // rows of input pixels of one unit; N * H rows in all
  int64_t row_groups;      // each with its own partial sums
  int64_t group_channels;  // channels of one unit
  int64_t channel_groups;
  int64_t units() const { return row_groups * channel_groups; }
};

/// The pointwise weights' gradient. How pixels are grouped depends on the shape alone, so that sums come out the same,
/// bit for bit, on any number of threads; columns are grouped for the threads.
struct CpuWgradPlan {
  int64_t tile_pixels;    // multiplied at a time
  int64_t group_pixels;   // a multiple of tile_pixels
  int64_t pixel_groups;   // each with its own partial sums
  int64_t group_columns;  // of C_mid: a multiple of 16
  int64_t column_groups;
  int64_t tasks() const { return pixel_groups * column_groups; }
};

/// Of this machine's second-level cache; half a MiB where the system does not say.
inline int64_t l2_cache_bytes() {
  const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return reported > 0 ? static_cast<int64_t>(reported) : int64_t{512} * 1024;
}

/// Tile and panel groups with the least estimated time of the slowest thread.
///
/// Costs are in multiply-adds of the float32 GEMM: a depthwise multiply-add costs about 1.6 of them (it converts,
/// loads more, and keeps fewer registers busy), one in bfloat16 half, and a byte of the packed weights, which every
/// task streams once from beyond the second-level cache, about one.
///
/// weights_packed: they are there already. Otherwise packing them all beforehand, through memory, costs a thread about
/// eight for each byte of its share; a task of z_first packs its panel into its own cache for three, and reads z from
/// the third-level cache for one.
inline CpuTilePlan plan_cpu_separable(const DepthwiseShape& shape, int64_t c_out, int threads, int64_t l2_bytes,
                                      int64_t z_bytes, bool weights_packed) {
  constexpr int64_t kTilePixels[] = {1008, 504, 252, 126, 108, 96, 84, 72, 60, 48, 36, 24, 12, 6, 3, 1};
  // Where channels are few, the start of a tile weighs; then it may be as large as the first-level cache holds.
  constexpr int64_t kUsualPixels = 126, kLongTileBytes = 16 * 1024;
  const int64_t pixels = shape.pixels_out();
  const int64_t c_mid = shape.c * shape.multiplier;
  const int64_t panels = ceil_div(c_out, kPanelColumns);
  const double per_pixel_z = 1.6 * static_cast<double>(c_mid * shape.taps());
  const double per_pixel_panel = (z_bytes == 2 ? 0.5 : 1.0) * static_cast<double>(c_mid * kPanelColumns);
  const double per_panel = static_cast<double>(c_mid * kPanelColumns * z_bytes);

  CpuTilePlan best{};
  double best_cost = 0;
  for (int64_t tile : kTilePixels) {
    if (tile > 1 && tile * c_mid * z_bytes > tile_budget(l2_bytes)) continue;
    if (tile > kUsualPixels && tile * c_mid * z_bytes > kLongTileBytes) continue;
    const int64_t fewest = std::max<int64_t>(ceil_div(pixels, tile), 1);
    const int64_t most_groups = std::min<int64_t>(panels, fewest < 4 * threads ? ceil_div(4 * threads, fewest) : 1);
    for (int64_t groups = 1; groups <= most_groups; ++groups) {
      const CpuTilePlan plan = cut_into_tiles(pixels, tile, panels, groups, threads);
      const double rows = static_cast<double>(pixels) / static_cast<double>(plan.tiles);
      const double group_panels = static_cast<double>(ceil_div(panels, groups));
      const double task = rows * (per_pixel_z + per_pixel_panel * group_panels) + per_panel * group_panels;
      const double cost = task * static_cast<double>(ceil_div(plan.tasks(), threads));
      if (best.tiles == 0 || cost < best_cost) {
        best = plan;
        best_cost = cost;
      }
    }
  }
  const double z_total = static_cast<double>(pixels * c_mid * z_bytes);
  if (weights_packed || z_total > static_cast<double>(kMaxWholeZBytes)) return best;
  best_cost += 8 * per_panel * static_cast<double>(panels) / threads;
  const double make_z = (static_cast<double>(pixels) * per_pixel_z + z_total) / threads;
  const double panel = static_cast<double>(pixels) * per_pixel_panel + 3 * per_panel + z_total;
  if (make_z + panel * static_cast<double>(ceil_div(panels, threads)) >= best_cost) return best;
  best = cut_into_tiles(pixels, kZFirstTilePixels, panels, 1, 1);
  best.z_first = true;
  return best;
}

/// depth: values of one pixel that are read, each of `bytes`. z_first: a task packs a panel of weights into its own
/// cache and multiplies all pixels by it, so that no packed weights go through memory; the pixels are read once for
/// every panel, so they must stay in a share of the third-level cache.
inline CpuTilePlan plan_cpu_product(int64_t pixels, int64_t depth, int64_t panels, int threads, int64_t bytes) {
  constexpr int64_t kRows = 6;  // pixels of one block of the product
  const int64_t fitting = kMaxTileBytes / (depth * bytes) / kRows * kRows;
  int64_t tile = std::clamp<int64_t>(fitting, kRows, 96);
  const bool even = panels % threads == 0 || panels >= 4 * threads;  // threads have about as many panels each
  if (even && pixels * depth * bytes <= kMaxWholeZBytes) {
    CpuTilePlan plan = cut_into_tiles(pixels, tile, panels, 1, 1);
    plan.z_first = true;
    return plan;
  }
  // Few pixels: tiles small enough that every thread has one, then groups of panels.
  tile = std::min(tile, std::max(round_up(ceil_div(pixels, threads), kRows), kRows));
  const int64_t tiles = std::max<int64_t>(ceil_div(pixels, tile), 1);
  const int64_t groups = std::clamp<int64_t>(ceil_div(4 * threads, tiles), 1, panels);
  return cut_into_tiles(pixels, tile, panels, tiles >= 4 * threads ? 1 : groups, threads);
}

/// Runs of output pixels: about four for each thread, none so short that starting it costs more than it does.
inline CpuDepthwisePlan plan_cpu_depthwise(const DepthwiseShape& shape, int threads) {
  constexpr int64_t kPlaneElements = 64 * 1024;  // to stay in the second-level cache
  constexpr int64_t kPlaneUnit = 16;             // squares of pixels and channels turn round as many at most
  const int64_t pixels = std::max<int64_t>(shape.pixels_out(), 1);
  const int64_t channels = std::max<int64_t>(shape.c * shape.multiplier, 1);
  const int64_t shortest = std::clamp<int64_t>(4096 / channels, 8, pixels);
  const int64_t run = std::clamp<int64_t>(ceil_div(pixels, int64_t{4} * threads), std::min<int64_t>(shortest, pixels),
                                          std::min<int64_t>(512, pixels));
  return {run, ceil_div(pixels, run), std::max(kPlaneElements / channels / kPlaneUnit, int64_t{1}) * kPlaneUnit};
}

/// Rows that the outputs of one row read, first to last.
inline int64_t rows_read(const DepthwiseShape& s) { return (s.r - 1) * s.geometry.dilation_h + 1; }

inline CpuRowsPlan plan_cpu_rows(const DepthwiseShape& s, bool nchw) {
  // Rows of a plane follow each other, so that many short ones are turned round as squares of pixels and channels.
  constexpr int64_t kLeastPixels = 64;
  const Geometry& g = s.geometry;
  CpuRowsPlan plan{};
  plan.at_once = nchw ? std::min(ceil_div(kLeastPixels, s.w), s.h) : 1;
  plan.slots = std::min(rows_read(s) + plan.at_once - 1, s.h);
  plan.columns = std::max(g.pad_left + s.w, (s.q - 1) * g.stride_w + (s.s - 1) * g.dilation_w + 1);
  return plan;
}

/// Whether each thread brings the rows of x as it comes to them, or all of x is brought beforehand. visits: how often
/// it would bring each. Rows at the edge of what two threads work on are brought by both, so there must be enough of
/// them; and NCHW that stays in the second-level caches is turned round faster as a whole, in long rows.
inline bool cpu_brings_rows(const DepthwiseShape& s, bool nchw, int threads, int64_t visits, int64_t element_bytes) {
  constexpr int64_t kLeastBytes = 512 * 1024;
  const int64_t shared = std::max<int64_t>(rows_read(s) - s.geometry.stride_h, 1);
  const bool large = s.pixels_in() * s.c * element_bytes >= kLeastBytes;
  return visits == 1 && 4 * shared * threads <= s.n * s.h && (large || !nchw);
}

/// Whether each thread brings the rows of an NHWC x although it could read them where they lie: with the columns of
/// neighbouring taps a page apart, all that a block reads falls into one set of the first-level cache, and what it
/// reads of a line is gone before the rest is wanted. Rows are brought with pixels a line further apart. lanes: floats
/// of a vector. Measured: worth it at stride 1 where a block reads many lines and what is brought stays in the
/// second-level cache; vectors of half a line gain at half a page, too, and with no others do the 16-bit types gain.
inline bool cpu_spreads_pixels(const DepthwiseShape& s, int threads, int64_t visits, int lanes, int64_t element_bytes) {
  constexpr int64_t kPage = 4096, kLeastLines = 20, kMostBytes = 1024 * 1024;
  const Geometry& g = s.geometry;
  const bool whole_lines = lanes >= 16;
  if (visits != 1 || g.stride_h != 1 || g.stride_w != 1 || (whole_lines && element_bytes < 4)) return false;
  const int64_t sets = whole_lines || element_bytes < 4 ? 1 : 2;
  if (sets * g.dilation_w * s.c * element_bytes % kPage != 0) return false;
  const int64_t block = s.q >= 8 ? 8 : s.q >= 4 ? 4 : 1;
  const int64_t brought = rows_read(s) * plan_cpu_rows(s, false).columns * s.c * element_bytes;
  const int64_t shared = 4 * (rows_read(s) - 1) * (threads - 1);
  return s.r * (block + s.s - 1) >= kLeastLines && brought <= kMostBytes && shared <= s.n * s.h;
}

inline CpuWgradPlan plan_cpu_wgrad(const DepthwiseShape& shape, int64_t c_out, int threads, int64_t z_bytes) {
  constexpr int64_t kTileBytes = 512 * 1024;            // of dv, to stay in the second-level cache
  constexpr int64_t kGroupProducts = int64_t{1} << 25;  // multiply-adds worth partial sums of their own
  constexpr int64_t kPartialBytes = 4 * 1024 * 1024;    // of all groups: written and read once more
  constexpr int64_t kMostGroups = 16;
  constexpr int64_t kColumnUnit = 16;
  constexpr int64_t kMostColumns = 384;
  constexpr int64_t kPanelBytes = 24 * 1024;  // of z, kPanelColumns wide, to stay in the first-level cache
  const int64_t c_mid = shape.c * shape.multiplier;
  const int64_t pixels = std::max<int64_t>(shape.pixels_out(), 1);
  CpuWgradPlan plan{};
  const int64_t longest =
      std::clamp<int64_t>(kTileBytes / (z_bytes * c_out), 8, kPanelBytes / (z_bytes * kPanelColumns));
  plan.tile_pixels = round_up(ceil_div(pixels, ceil_div(pixels, longest)), 2);
  const int64_t tiles = ceil_div(pixels, plan.tile_pixels);
  const int64_t affordable = kPartialBytes / (4 * c_out * round_up(c_mid, kColumnUnit));
  const int64_t wanted = pixels * c_mid * c_out / kGroupProducts;
  const int64_t groups = std::clamp<int64_t>(std::min(wanted, affordable), 1, std::min(tiles, kMostGroups));
  plan.group_pixels = ceil_div(tiles, groups) * plan.tile_pixels;
  plan.pixel_groups = ceil_div(pixels, plan.group_pixels);

  // Columns so few that z and dv both stay in the second-level cache, and as many groups as give every thread the same
  // number of tasks, or at least one.
  const int64_t units = ceil_div(c_mid, kColumnUnit);
  int64_t parts = std::max(ceil_div(c_mid, kMostColumns), ceil_div(threads, plan.pixel_groups));
  parts = std::clamp<int64_t>(parts, 1, units);
  for (int64_t even = parts; even <= std::min<int64_t>(units, parts + threads); ++even) {
    if (plan.pixel_groups * even % threads != 0) continue;
    parts = even;
    break;
  }
  plan.group_columns = ceil_div(units, parts) * kColumnUnit;
  plan.column_groups = ceil_div(c_mid, plan.group_columns);
  return plan;
}

/// Whether the backward turns NCHW round in its tiles and units, which spares whole tensors a way through memory; of
/// few channels, so few squares of pixels and channels at a time that whole tensors are turned as fast.
inline bool cpu_turns_in_units(const DepthwiseShape& s) {
  constexpr int64_t kLeastChannels = 32;
  return s.c >= kLeastChannels;
}

inline CpuBackwardPlan plan_cpu_backward(const DepthwiseShape& shape) {
  constexpr int64_t kUnitElements = 32 * 1024;  // of x: large beside a unit's partial sums, small beside a picture
  constexpr int64_t kPartialBytes = 12 * 1024;  // of one unit, to stay in the first-level cache
  constexpr int64_t kMostRowGroups = 256;
  const int64_t taps = std::max<int64_t>(shape.taps() * shape.multiplier, 1);
  const int64_t fitting = kPartialBytes / (taps * static_cast<int64_t>(sizeof(float))) / 64 * 64;
  const int64_t group_channels = std::clamp<int64_t>(fitting, 64, 512);
  const int64_t rows = std::max<int64_t>(shape.n * shape.h, 1);
  const int64_t row_elements = std::max<int64_t>(shape.w * std::min(group_channels, shape.c), 1);
  int64_t group_rows = std::clamp<int64_t>(kUnitElements / row_elements, 1, rows);
  group_rows = std::max(group_rows, ceil_div(rows, kMostRowGroups));
  return {group_rows, ceil_div(rows, group_rows), group_channels, ceil_div(shape.c, group_channels)};
}

}  // namespace xsep
