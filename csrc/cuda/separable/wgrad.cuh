// The gradient of the pointwise weights, z never reaching global memory: dw_pw = sum over pixels of dy z^T.
//
// A CTA walks over its tiles and their chunks of channels as the forward does, with dy in the place of w_pw. dw_pw
// stays in its warps' accumulators, a block each of one chunk's channels: where a step is of that chunk, the warp adds
// to it. The sums leave as partials, and a second kernel adds them up. Rows of z of which the tile has no pixel are
// zeros, as those of dy are: what else were there might be infinite, and its product with nothing NaN.
//
//   barrier k | copy x k+halos, dy of the tile of x k+halos-1 | map tile k+halos+1 | depthwise: x k+1 -> z k+1 |
//   multiply: dy, z k | wait
#pragma once

#include "../launch.cuh"
#include "diagonal.cuh"
#include "halo.cuh"
#include "multiply.cuh"
#include "wgrad.h"

namespace xsep::cuda {

// The block of dw_pw that a warp holds, and which of its pixels' products are the warp's. One register keeps it, as the
// divisions by which it is found take more instructions than a step's other business.
class WgradBlock {
 public:
  __device__ __forceinline__ explicit WgradBlock(const WgradSplit& split) {
    const int warp = static_cast<int>(threadIdx.x) / 32, warps = split.output_blocks * split.shares;
    const int chunk = warp / warps, within = warp % warps;
    packed_ = kept(chunk << 16 | within / split.output_blocks << 8 | within % split.output_blocks);
  }
  __device__ __forceinline__ int chunk() const { return packed_ >> 16; }  // of the part's; none where it has fewer
  __device__ __forceinline__ int share() const { return packed_ >> 8 & 0xff; }
  __device__ __forceinline__ int output() const { return packed_ & 0xff; }  // in blocks

 private:
  int packed_;
};

// Starts copying dy of a step's tile, [output_blocks, z_rows] rows of kWarpChannels outputs; zeros where there is none.
template <class T>
__device__ __forceinline__ void copy_outputs(const SeparableWgradParams& p, const FusedMemory& memory,
                                             const FusedStep& step, const void* image, unsigned char* buffer) {
  const SeparablePlan& plan = p.layer.plan;
  const FusedTile& tile = memory.tile[step.map];
  const int outputs = p.layer.c_out, of_row = p.layer.shape.q * outputs;
  const int tid = static_cast<int>(threadIdx.x), first = tid % 8 * 8;
  // Kept, as in Halo::copy; of a piece that is not there, the address of one that is.
  const T* source =
      kept(static_cast<const T*>(image) + tile.first_pixel(p.layer) * outputs + (first < outputs ? first : 0));
#pragma unroll 2
  for (int row = tid / 8; row < plan.z_rows; row += kFusedThreads / 8) {
    const int place = memory.place[row], down = place >> 16, across = place & 0xffff;
    const bool there = down < tile.rows && across < tile.columns;
    const int at = kept(down * of_row + across * outputs), left = kept(there ? outputs - first : 0);
    unsigned char* out = buffer + swizzled_offset(row, tid % 8, kWgradChunkBytes);
#pragma unroll 1
    for (int channel = 0; channel < p.split.output_blocks * kWarpChannels; channel += kWarpChannels) {
      const bool valid = channel < left;
      cp_async_16(out, source + kept(static_cast<unsigned>(valid ? at + channel : 0)), valid ? 1 : 0);
      out += plan.z_rows * kWgradChunkBytes;
    }
  }
}

// Rows of a buffer of z of which a tile of so many rows and columns has no pixel.
__device__ __forceinline__ void clear_others(const SeparablePlan& plan, const FusedMemory& memory, int rows,
                                             int columns, unsigned char* z) {
  for (int i = static_cast<int>(threadIdx.x); i < plan.z_rows * 8; i += kFusedThreads) {
    const int place = memory.place[i / 8];
    if (place >> 16 < rows && (place & 0xffff) < columns) continue;
    Pack<uint32_t, 4>::zero().store(reinterpret_cast<uint32_t*>(z + i * 16));
  }
}

// The block's sums += dy^T z over a step's pixels that are the warp's, 16 at a time. ldmatrix's rows are pixels, so it
// transposes both. Pixels that one lane reads are multiples of 8 apart and share their permutation, as in
// multiply_chunk.
template <class T>
__device__ __forceinline__ void add_products(Accumulators& sums, const SeparableWgradParams& p, const WgradBlock& block,
                                             const unsigned char* dy, const unsigned char* z) {
  constexpr int kStep = 16 * kWgradChunkBytes;
  const int lane = static_cast<int>(thread_index_again()) % 32, z_rows = p.layer.plan.z_rows;
  const int first = block.share() * kStep;
  int of_dy = shared_place(dy) + block.output() * z_rows * kWgradChunkBytes + first +
              swizzled_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2, kWgradChunkBytes);
  int of_z = shared_place(z) + first + swizzled_offset(lane % 16, lane / 16, kWgradChunkBytes);
#pragma unroll 1
  for (int step = block.share(); step < z_rows / 16; step += p.split.shares) {
    uint32_t a[kMmaRows][4];
#pragma unroll
    for (int i = 0; i < kMmaRows; ++i) ldmatrix_x4_transposed(a[i], shared_base() + (of_dy ^ i << 5));
#pragma unroll
    for (int j = 0; j < kMmaColumns; j += 2) {
      uint32_t b[4];
      ldmatrix_x4_transposed(b, shared_base() + (of_z ^ j << 4));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < kMmaRows; ++i) {
        mma_m16n8k16(sums[i * kMmaColumns + j], a[i], left, T());
        mma_m16n8k16(sums[i * kMmaColumns + j + 1], a[i], right, T());
      }
    }
    of_dy += p.split.shares * kStep, of_z += p.split.shares * kStep;
  }
}

// Leaves the warp's block in its share's row of the partials.
__device__ __forceinline__ void store_sums(const Accumulators& sums, const SeparableWgradParams& p,
                                           const WgradBlock& block, int first_chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32, outputs = p.layer.c_out, inputs = p.layer.shape.c_in;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.split.shares + block.share();
  float* partial = p.partials + row * outputs * inputs;
#pragma unroll
  for (int i = 0; i < kMmaRows * 2; ++i) {
    const int c_out = block.output() * kWarpChannels + i * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < kMmaColumns; ++j) {
      const int c_in = (first_chunk + block.chunk()) * kWarpChannels + j * 8 + lane % 4 * 2;
      if (c_out >= outputs || c_in >= inputs) continue;
      const float (&sum)[4] = sums[i / 2 * kMmaColumns + j];
      const float pair[2] = {sum[i % 2 * 2], sum[i % 2 * 2 + 1]};
      Pack<float, 2>::round(pair).store(partial + static_cast<int64_t>(c_out) * inputs + c_in);
    }
  }
}

// The kernel. `upstream` brings what stands for dy: copy(step, buffer) starts it for a step's tile, arrived(step,
// buffer) comes when all of it is there that this thread has copied, before other threads read it.
template <class T, int K, int STRIDE, class Upstream>
__device__ __forceinline__ void make_wgrad(const SeparableWgradParams& p, const FusedMemory& memory,
                                           const Upstream& upstream) {
  const SeparablePlan& plan = p.layer.plan;
  const int halos = plan.halos, first_chunk = static_cast<int>(blockIdx.y) * plan.chunks;
  const auto in_x = [&](const FusedStep& step) { return FusedStep{step.tile, first_chunk + step.chunk, step.map}; };

  // The steps whose z is made in the first turn of the loop, whose x is copied next, and whose x was copied last.
  FusedStep windowed{static_cast<int>(blockIdx.x), 0, 0}, copied = windowed, fed{plan.tiles, 0, 0};
  for (int i = 0; i < halos; ++i) {
    if (copied.chunk == 0 && copied.exists(plan)) map_tile<K, STRIDE>(p.layer, memory, copied);
    copied.advance(plan);
  }
  load_tables<T>(p.layer, memory);
  __syncthreads();
  for (int i = 0; i < 2; ++i) clear_others(plan, memory, 0, 0, memory.z[i]);
  int fed_buffer = 0;  // for dy of the next tile
  const auto copy = [&](int to) {
    if (fed.chunk == 0 && fed.exists(plan)) {
      upstream.copy(fed, memory.operand[fed_buffer]);
      fed_buffer = fed_buffer + 1 == plan.operand_buffers ? 0 : fed_buffer + 1;
    }
    if (copied.exists(plan)) Halo<T>{p.layer, memory, in_x(copied), memory.halo[to]}.copy();
    cp_async_commit();
    fed = copied;
    copied.advance(plan);
  };
  copied = windowed;
  for (int i = 0; i < halos - 1; ++i) copy(i);

  Accumulators sums = {};
  const WgradBlock block(p.split);
  FusedStep multiplied{plan.tiles, 0, 0};  // none yet
  int even = 1, halo = halos - 1, dy = 0;  // buffers of the step that is multiplied: of z, of x, of dy
  do {
    const int next = halo + 1 == halos ? 0 : halo + 1;
    wait_for_copies(halos - 2);
    const FusedStep made = in_x(windowed);
    if (p.layer.has_prologue != 0 && windowed.exists(plan)) {
      Halo<T>{p.layer, memory, made, memory.halo[next]}.transform();
    }
    if (multiplied.chunk == 0 && multiplied.exists(plan)) upstream.arrived(multiplied, memory.operand[dy]);
    __syncthreads();
    copy(halo);
    if (copied.chunk == 0 && copied.exists(plan)) map_tile<K, STRIDE>(p.layer, memory, copied);
    __syncwarp();  // ldmatrix wants all lanes, and they have taken several ways
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if ((turn == 0) == (static_cast<int>(thread_index_again()) / 32 * 2 < kMostFusedWarps)) {
        if (!windowed.exists(plan)) continue;
        const FusedTile& tile = memory.tile[windowed.map];
        unsigned char* const z = memory.z[even ^ 1];
        if (tile.rows < plan.tile_rows || tile.columns < plan.tile_columns) {
          clear_others(plan, memory, tile.rows, tile.columns, z);
          __syncwarp();
        }
        DiagonalDepthwise<T, K, STRIDE, kWgradChunkBytes, true>(p.layer, memory, made, memory.halo[next], z).run();
      } else {
        if (!multiplied.exists(plan) || block.chunk() != multiplied.chunk) continue;
        add_products<T>(sums, p, block, memory.operand[dy], memory.z[even]);
      }
    }
    if (multiplied.exists(plan) && multiplied.chunk == plan.chunks - 1) {
      dy = dy + 1 == plan.operand_buffers ? 0 : dy + 1;
    }
    multiplied = windowed;
    windowed.advance(plan);
    halo = next;
    even ^= 1;
  } while (multiplied.exists(plan));
  if (block.chunk() < plan.chunks) store_sums(sums, p, block, first_chunk);
}

// dy as it is in memory.
template <class T>
struct PlainUpstream {
  const SeparableWgradParams& p;
  const FusedMemory& memory;

  __device__ __forceinline__ void copy(const FusedStep& step, unsigned char* buffer) const {
    copy_outputs<T>(p, memory, step, p.dy, buffer);
  }
  __device__ __forceinline__ void arrived(const FusedStep&, unsigned char*) const {}
};

template <class T, int K, int STRIDE>
__global__ void __launch_bounds__(kFusedThreads, 1)
    separable_wgrad_kernel(const __grid_constant__ SeparableWgradParams p) {
  SharedArena arena;
  const FusedMemory memory(p.layer, arena);
  make_wgrad<T, K, STRIDE>(p, memory, PlainUpstream<T>{p, memory});
}

inline LaunchShape wgrad_launch(const SeparableWgradParams& p, int shared_bytes) {
  return {dim3(static_cast<unsigned>(p.layer.plan.workers), static_cast<unsigned>(p.split.parts)), kFusedThreads,
          shared_bytes};
}

// As the kernel wants them.
inline SeparableWgradParams completed(SeparableWgradParams p) {
  p.layer.has_prologue = p.layer.prologue.is_identity() ? 0 : 1;
  return p;
}

template <class T>
void launch_separable_wgrad(const SeparableWgradParams& p, cudaStream_t stream) {
  void (*kernel)(SeparableWgradParams) = nullptr;
  switch (p.layer.shape.r * 10 + p.layer.shape.stride_h) {
    case 31:
      kernel = separable_wgrad_kernel<T, 3, 1>;
      break;
    case 32:
      kernel = separable_wgrad_kernel<T, 3, 2>;
      break;
    case 51:
      kernel = separable_wgrad_kernel<T, 5, 1>;
      break;
    case 52:
      kernel = separable_wgrad_kernel<T, 5, 2>;
      break;
    default:
      no_such_kernel("separable_wgrad_kernel", p);
  }
  launch(kernel, "separable_wgrad_kernel", wgrad_launch(p, p.layer.plan.shared_bytes), stream, completed(p));
}

}  // namespace xsep::cuda
