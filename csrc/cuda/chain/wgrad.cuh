// The pointwise weights' gradient in the training chain: as everywhere, but dr takes the place of dy. du and r come by
// cp.async; each thread makes dr of the pieces that it has copied, in the place of du, and stores it for dz.
#pragma once

#include "../separable/wgrad.cuh"
#include "raw_gradient.cuh"
#include "wgrad.h"

namespace xsep::cuda {

template <class T>
struct RawUpstream {
  const ChainWgradParams& p;
  const FusedMemory& memory;
  SharedBuffer<unsigned char> r;  // of one tile, as dr
  SharedBuffer<float> coef;       // [3, C_out]

  __device__ __forceinline__ void copy(const FusedStep& step, unsigned char* buffer) const {
    copy_outputs<T>(p.wgrad, memory, step, p.gradient.du, buffer);
    copy_outputs<T>(p.wgrad, memory, step, p.gradient.r, r.get());
  }

  // Of a tile's pieces, those that copy_outputs has had this thread copy.
  __device__ __forceinline__ void arrived(const FusedStep& step, unsigned char* buffer) const {
    const SeparablePlan& plan = p.wgrad.layer.plan;
    const FusedTile& tile = memory.tile[step.map];
    const int outputs = p.wgrad.layer.c_out, of_row = p.wgrad.layer.shape.q * outputs;
    const int tid = static_cast<int>(threadIdx.x), first = tid % 8 * 8;
    T* dr = static_cast<T*>(p.gradient.dr) + tile.first_pixel(p.wgrad.layer) * outputs;
#pragma unroll 1
    for (int c = first, block = 0; c < outputs; c += kWarpChannels, block += plan.z_rows * kWgradChunkBytes) {
      float factors[3][8];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int half = 0; half < 8; half += 4) {
          const auto part = Pack<float, 4>::load(coef.get() + i * outputs + c + half);
#pragma unroll
          for (int v = 0; v < 4; ++v) factors[i][half + v] = part.v[v];
        }
      }
#pragma unroll 1
      for (int row = tid / 8; row < plan.z_rows; row += kFusedThreads / 8) {
        const int place = memory.place[row], down = place >> 16, across = place & 0xffff;
        if (down >= tile.rows || across >= tile.columns) continue;
        const int offset = block + swizzled_offset(row, tid % 8, kWgradChunkBytes);
        T* piece = reinterpret_cast<T*>(buffer + offset);
        float du[8], value[8];
        Pack<T, 8>::load(piece).widen(du);
        Pack<T, 8>::load(reinterpret_cast<T*>(r.get() + offset)).widen(value);
        form_raw_gradient(value, du, factors);
        const auto rounded = Pack<T, 8>::round(value);
        rounded.store(piece);
        if (blockIdx.y == 0) rounded.store(dr + down * of_row + across * outputs + c);  // all parts have the same
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kFusedThreads, 1) chain_wgrad_kernel(const __grid_constant__ ChainWgradParams p) {
  const SeparablePlan& plan = p.wgrad.layer.plan;
  SharedArena arena;
  const FusedMemory memory(p.wgrad.layer, arena);
  const int outputs = p.wgrad.layer.c_out;
  const RawUpstream<T> upstream{p, memory,
                                arena.take_at<unsigned char>(p.extras.r, plan.operand_rows * kWgradChunkBytes),
                                arena.take_at<float>(p.extras.coef, 3 * outputs)};
  // Barriers come before it is read.
  for (int i = static_cast<int>(threadIdx.x); i < 3 * outputs; i += kFusedThreads) {
    upstream.coef[i] = p.gradient.coef[i];
  }
  make_wgrad<T, 3, 1>(p.wgrad, memory, upstream);
}

template <class T>
void launch_chain_wgrad(const ChainWgradParams& p, cudaStream_t stream) {
  ChainWgradParams whole = p;
  whole.wgrad = completed(p.wgrad);
  launch(chain_wgrad_kernel<T>, "chain_wgrad_kernel", wgrad_launch(p.wgrad, p.extras.shared_bytes), stream, whole);
}

}  // namespace xsep::cuda
