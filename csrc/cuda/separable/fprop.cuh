// Fused separable forward: depthwise into shared memory, tensor cores out of it; z never reaches global memory.
//
// A CTA walks over its tiles, and over each tile's input channels in chunks; one chunk of one tile is a step. The walk
// does not stop between tiles: cp.async brings x some steps ahead (zero fill is the padding), the next tile's while
// this one's y is stored, and w_pw stays in shared memory where it fits. One barrier a step: between two barriers a
// warp computes its share of the next step's z and multiplies its block of this step's. The upper half of the warps
// does so the other way round, so that one warp's multiply-adds run beside the other's tensor core.
//
//   barrier k | copy x k+halos | map tile k+halos+1 | depthwise: x k+1 -> z k+1 | multiply: z k, w_pw k | store y |
//   wait
#pragma once

#include "../launch.cuh"
#include "diagonal.cuh"
#include "epilogue.cuh"
#include "halo.cuh"
#include "strips.cuh"

namespace xsep::cuda {

template <class T>
__device__ __forceinline__ void copy_w_pw(const SeparableFpropParams& p, unsigned char* buffer, int chunk) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  const int log2_units = p.plan.chunk_log2 - 4, tid = static_cast<int>(threadIdx.x);
  const int unit = tid & ((1 << log2_units) - 1), stride = static_cast<int>(blockDim.x) >> log2_units;
  const int c = ((chunk << log2_units) + unit) * kVec;
  // The order of the columns repeats every 32, so that the next row's channel often is as many further on.
  int n = channel_of_column(tid >> log2_units);
  for (int row = tid >> log2_units; row < p.plan.operand_rows;
       row += stride, n = stride % kRunsBlock == 0 ? n + stride : channel_of_column(row)) {
    const bool valid = n < p.c_out && c < p.shape.c_in;
    const T* source = static_cast<const T*>(p.w_pw) + (valid ? static_cast<int64_t>(n) * p.shape.c_in + c : 0);
    cp_async_16(buffer + swizzled_offset(row, unit, p.plan.chunk_bytes), source, valid ? 1 : 0);
  }
}

// z of one step, of chunks of CHUNK bytes.
template <class T, int K, int STRIDE, int CHUNK>
__device__ __forceinline__ void make_z(const SeparableFpropParams& p, const FusedMemory& memory, const FusedStep& step,
                                       const unsigned char* halo, unsigned char* z) {
  if constexpr (sizeof(T) == 2) {
    DiagonalDepthwise<T, K, STRIDE, CHUNK>(p, memory, step, halo, z).run();
  } else {
    depthwise_chunk<T, K, STRIDE, CHUNK>(p, memory, step, halo, z);
  }
}

template <class Policy, int K, int STRIDE>
__global__ void __launch_bounds__(kFusedThreads, 1)
    separable_fprop_kernel(const __grid_constant__ SeparableFpropParams p) {
  using T = typename Policy::T;
  const SeparablePlan& plan = p.plan;
  SharedArena arena;
  const FusedMemory memory(p, arena);
  const int halos = plan.halos;

  // Copies begin first, those of x as soon as they can: nothing else is done while the tables are filled.
  for (int chunk = 0; plan.keeps_w_pw && chunk < plan.chunks; ++chunk) copy_w_pw<T>(p, memory.operand[chunk], chunk);
  // The steps whose z is made in the first turn of the loop, whose x is copied next, and the one behind that, whose
  // tile is mapped next.
  FusedStep windowed{static_cast<int>(blockIdx.x), 0, 0};
  FusedStep copied = windowed;
  for (int i = 0; i < halos; ++i) {
    if (copied.chunk == 0 && copied.exists(plan)) map_tile<K, STRIDE>(p, memory, copied);
    copied.advance(plan);
  }
  __syncthreads();
  copied = windowed;
  for (int i = 0; i < halos - 1; ++i) {
    if (copied.exists(plan)) Halo<T>{p, memory, copied, memory.halo[i]}.copy();
    cp_async_commit();
    copied.advance(plan);
  }
  load_tables<T>(p, memory);
  __syncthreads();

  Accumulators accumulators = {};
  FusedStep multiplied{plan.tiles, 0, 0};  // none yet
  int even = 1, halo = halos - 1;  // buffers of the step that is multiplied: of z (and w_pw, if it has two), and of x
  do {
    const int next = halo + 1 == halos ? 0 : halo + 1;
    wait_for_copies(halos - 2);
    if (p.has_prologue != 0 && windowed.exists(plan)) Halo<T>{p, memory, windowed, memory.halo[next]}.transform();
    __syncthreads();
    if (copied.exists(plan)) Halo<T>{p, memory, copied, memory.halo[halo]}.copy();
    if (!plan.keeps_w_pw && windowed.exists(plan)) copy_w_pw<T>(p, memory.operand[even ^ 1], windowed.chunk);
    cp_async_commit();
    copied.advance(plan);
    if (copied.chunk == 0 && copied.exists(plan)) map_tile<K, STRIDE>(p, memory, copied);
    __syncwarp();  // ldmatrix wants all lanes, and they have taken several ways
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if ((turn == 0) == (static_cast<int>(thread_index_again()) / 32 * 2 < plan.warps)) {
        if (!windowed.exists(plan)) continue;
        if (plan.chunk_log2 == 7) {
          make_z<T, K, STRIDE, 128>(p, memory, windowed, memory.halo[next], memory.z[even ^ 1]);
        } else {
          make_z<T, K, STRIDE, 64>(p, memory, windowed, memory.halo[next], memory.z[even ^ 1]);
        }
      } else {
        const WarpBlock block(p);
        if (!multiplied.exists(plan) || !block.exists) continue;
        const unsigned char* w_pw = memory.operand[plan.keeps_w_pw ? multiplied.chunk : even];
        if (plan.chunk_log2 == 7) {
          multiply_chunk<Policy, 128>(accumulators, memory.z[even], w_pw, block);
        } else {
          multiply_chunk<Policy, 64>(accumulators, memory.z[even], w_pw, block);
        }
      }
    }
    if (multiplied.exists(plan) && multiplied.chunk == plan.chunks - 1) {
      finish_tile<T>(p, memory, multiplied, accumulators, WarpBlock(p), memory.z[even]);
#pragma unroll
      for (auto& fragment : accumulators) map(fragment, [](float) { return 0.0f; });
    }
    multiplied = windowed;
    windowed.advance(plan);
    halo = next;
    even ^= 1;
  } while (multiplied.exists(plan));
}

template <class Policy>
void launch_separable_fprop(const SeparableFpropParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers)), 32 * p.plan.warps, p.plan.shared_bytes};
  void (*kernel)(SeparableFpropParams) = nullptr;
  switch (p.shape.r * 10 + p.shape.stride_h) {
    case 31:
      kernel = separable_fprop_kernel<Policy, 3, 1>;
      break;
    case 32:
      kernel = separable_fprop_kernel<Policy, 3, 2>;
      break;
    case 51:
      kernel = separable_fprop_kernel<Policy, 5, 1>;
      break;
    case 52:
      kernel = separable_fprop_kernel<Policy, 5, 2>;
      break;
    default:
      no_such_kernel("separable_fprop_kernel", p);
  }
  SeparableFpropParams completed = p;
  completed.has_prologue = p.prologue.is_identity() && p.addend == nullptr ? 0 : 1;
  completed.has_middle = p.middle.is_identity() ? 0 : 1;
  completed.has_epilogue = p.epilogue.is_identity() && p.bias.data == nullptr ? 0 : 1;
  launch(kernel, "separable_fprop_kernel", shape, stream, completed);
}

}  // namespace xsep::cuda
