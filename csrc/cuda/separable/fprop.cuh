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
#include "strips.cuh"

namespace xsep::cuda {

// The x of one step, in one of the halo buffers.
template <class T>
struct Halo {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T));

  const SeparableFpropParams& p;
  const FusedMemory& memory;
  const FusedStep& step;
  unsigned char* buffer;

  // Where the map counts from for this thread, in elements of x: its first channel, or the pixel's where that is past
  // the last one.
  __device__ __forceinline__ int64_t origin() const {
    const int c = first_channel();
    return static_cast<int64_t>(memory.tile[step.map].first_x_row) * (p.shape.w * p.shape.c_in) +
           (c < p.shape.c_in ? c : 0);
  }

  // Which 16 bytes of a pixel's chunk this thread has, and their first channel.
  __device__ __forceinline__ int unit() const {
    return static_cast<int>(threadIdx.x) & ((1 << (p.plan.chunk_log2 - 4)) - 1);
  }
  __device__ __forceinline__ int first_channel() const {
    return ((step.chunk << (p.plan.chunk_log2 - 4)) + unit()) * kVec;
  }

  // Calls f(piece, where it is from the origin on, whether it is there, whether the tile is to write x_pre of it), both
  // 0 if not, for this thread's 16-byte pieces: the same ones for a copy and for what is done to it after the wait,
  // which therefore needs no barrier between.
  template <class Function>
  __device__ __forceinline__ void for_each_piece(Function f) const {
    const int first = step.map * (p.plan.halo_rows * p.plan.halo_pitch);
    const SharedBuffer<int> source{kept(memory.source.place + first * static_cast<int>(sizeof(int)))};
    // Past the last channel nothing is there, at an address that could be read.
    const int flags = first_channel() < p.shape.c_in ? kIsPixel | kIsOwned : 0;
    for_each_place([&](unsigned char* piece, int pixel) {
      const int of_x = source[pixel];
      f(piece, of_x & ~(kIsPixel | kIsOwned), of_x & flags & kIsPixel, of_x & kIsOwned);
    });
  }

  // Calls f(piece, its pixel in the buffer), whether there is a pixel or padding.
  template <class Function>
  __device__ __forceinline__ void for_each_place(Function f) const {
    const SeparablePlan& plan = p.plan;
    const int log2_units = plan.chunk_log2 - 4, pixels = plan.halo_rows * plan.halo_pitch;
    const int step = static_cast<int>(blockDim.x) >> log2_units, bytes = step * plan.pixel_bytes;
    int i = static_cast<int>(threadIdx.x) >> log2_units;
    int place = shared_place(buffer) + i * plan.pixel_bytes + unit() * 16;
#pragma unroll 4
    for (; i < pixels; i += step, place += bytes) f(shared_base() + place, i);
  }

  __device__ __forceinline__ void copy() const {
    // Kept, so that an address is one instruction: a product of a number of which nothing is known, and a sum.
    const T* x = kept(static_cast<const T*>(p.x) + origin());
    for_each_piece([=](unsigned char* piece, int at, int exists, int) {
      cp_async_16(piece, x + kept(static_cast<unsigned>(at)), exists);
    });
  }

  // Applies the prologue where there is a pixel; padding stays zero.
  __device__ __forceinline__ void transform() const {
    const bool with_affine = p.prologue.scale.data != nullptr || p.prologue.shift.data != nullptr;
    // Two values at a time, and those that have been rounded already: the larger of a value and 0 rounds alike before
    // and after.
    const bool by_pairs = sizeof(T) == 2 && p.prologue.activation == Activation::kRelu;
    if (by_pairs && !with_affine && p.addend == nullptr) {
      for_each_place([](unsigned char* place, int) {  // padding's zeros among them
        auto piece = Pack<T, kVec>::load(reinterpret_cast<T*>(place));
        piece.relu();
        piece.store(reinterpret_cast<T*>(place));
      });
      return;
    }
    // Of the thread's channels, which are the same for all its pieces; the table reaches past the last channel.
    float scale[kVec], shift[kVec];
    const float* table = memory.vectors.get() + first_channel();
#pragma unroll
    for (int half = 0; half < kVec; half += 4) {
      const auto a = Pack<float, 4>::load(table + half);
      const auto b = Pack<float, 4>::load(table + p.plan.table_channels + half);
#pragma unroll
      for (int v = 0; v < 4; ++v) scale[half + v] = a.v[v], shift[half + v] = b.v[v];
    }
    const auto apply_affine = [&](float (&u)[kVec]) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) u[v] = fmaf(scale[v], u[v], shift[v]);
    };
    if (by_pairs && p.addend == nullptr) {  // BatchNorm and ReLU, as networks have them: no branch
      for_each_piece([&](unsigned char* place, int, int exists, int) {
        T* piece = reinterpret_cast<T*>(place);
        float u[kVec];
        Pack<T, kVec>::load(piece).widen(u);
        apply_affine(u);
        auto rounded = Pack<T, kVec>::round(u);
        rounded.relu();
        if (exists != 0) rounded.store(piece);
      });
      return;
    }
    const int64_t first = origin();
    for_each_piece([&](unsigned char* place, int at, int exists, int owned) {
      if (exists == 0) return;
      T* piece = reinterpret_cast<T*>(place);
      float u[kVec];
      Pack<T, kVec>::load(piece).widen(u);
      if (with_affine) apply_affine(u);
      auto rounded = Pack<T, kVec>::round(u);
      if (p.addend != nullptr) {
        float other[kVec];
        Pack<T, kVec>::load(static_cast<const T*>(p.addend) + first + at).widen(other);
#pragma unroll
        for (int v = 0; v < kVec; ++v) u[v] += other[v];
        // The activation sees the sum as it is stored, so that a backward that reads it finds the same signs.
        rounded = Pack<T, kVec>::round(u);
        if (owned != 0) rounded.store(static_cast<T*>(p.x_pre) + first + at);
        rounded.widen(u);
      }
      if (by_pairs) {
        rounded.relu();
      } else {
        activate(u, {p.prologue.activation, p.prologue.alpha});
        rounded = Pack<T, kVec>::round(u);
      }
      rounded.store(piece);
    });
  }
};

template <class T>
__device__ __forceinline__ void copy_w_pw(const SeparableFpropParams& p, unsigned char* buffer, int chunk) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  const int log2_units = p.plan.chunk_log2 - 4, tid = static_cast<int>(threadIdx.x);
  const int unit = tid & ((1 << log2_units) - 1), stride = static_cast<int>(blockDim.x) >> log2_units;
  const int c = ((chunk << log2_units) + unit) * kVec;
  // The order of the columns repeats every 32, so that the next row's channel often is as many further on.
  int n = channel_of_column(tid >> log2_units);
  for (int row = tid >> log2_units; row < p.plan.w_pw_rows;
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

// Waits until no more than `left` of this thread's newest groups of copies are on their way.
__device__ __forceinline__ void wait_for_copies(int left) {
  static_assert(kMostHalos - 2 <= 2, "none but these");
  if (left == 0) {
    cp_async_wait<0>();
  } else if (left == 1) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<2>();
  }
}

template <class Policy, int K, int STRIDE>
__global__ void __launch_bounds__(kFusedThreads, 1)
    separable_fprop_kernel(const __grid_constant__ SeparableFpropParams p) {
  using T = typename Policy::T;
  const SeparablePlan& plan = p.plan;
  const FusedMemory memory(p);
  const int halos = plan.halos;

  // Copies begin first, those of x as soon as they can: nothing else is done while the tables are filled.
  for (int chunk = 0; plan.keeps_w_pw && chunk < plan.chunks; ++chunk) copy_w_pw<T>(p, memory.w_pw[chunk], chunk);
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
    if (!plan.keeps_w_pw && windowed.exists(plan)) copy_w_pw<T>(p, memory.w_pw[even ^ 1], windowed.chunk);
    cp_async_commit();
    copied.advance(plan);
    if (copied.chunk == 0 && copied.exists(plan)) map_tile<K, STRIDE>(p, memory, copied);
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
        const unsigned char* w_pw = memory.w_pw[plan.keeps_w_pw ? multiplied.chunk : even];
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
