// x on its way into shared memory, a chunk of channels of a tile and its halo at a time, and the prologue on it there.
#pragma once

#include "../activation.cuh"
#include "tile.cuh"

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

}  // namespace xsep::cuda
