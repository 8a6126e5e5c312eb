// Neighbouring pixels of one row of an image, as one thread has them.
#pragma once

#include "numeric.cuh"

namespace xsep::cuda {

// Columns first, first + 1, ..., of which an image of so many has all or some.
template <int WIDTH>
struct Columns {
  int first, size;

  __device__ __forceinline__ bool all() const { return first >= 0 && first <= size - WIDTH; }
  __device__ __forceinline__ bool has(int i) const {
    return static_cast<unsigned>(first + i) < static_cast<unsigned>(size);
  }

  // Zeros where there is no pixel.
  template <int VEC>
  __device__ __forceinline__ void clear_others(float (&values)[WIDTH][VEC]) const {
    if (all()) return;
    const Columns some{kept(first), size};
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) values[i][v] = some.has(i) ? values[i][v] : 0.0f;
    }
  }
};

// VEC channels of each pixel as they are stored, zero where there is no pixel.
template <class T, int VEC, int WIDTH>
struct PixelRow {
  Pack<T, VEC> pixel[WIDTH];

  // source: the first pixel's, whether or not it is there; step: elements from one pixel to the next. A row that is not
  // there is zeros.
  __device__ __forceinline__ void load(const T* source, int64_t step, const Columns<WIDTH>& columns,
                                       bool is_row = true) {
    if (is_row && columns.all()) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) pixel[i] = Pack<T, VEC>::load(source + i * step);
    } else {
      const Columns<WIDTH> some{kept(columns.first), columns.size};
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        pixel[i] = is_row && some.has(i) ? Pack<T, VEC>::load(source + i * step) : Pack<T, VEC>::zero();
      }
    }
  }

  __device__ __forceinline__ void widen(float (&values)[WIDTH][VEC]) const {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) pixel[i].widen(values[i]);
  }

  // Before widening it takes half the instructions, and leaves the zeros beside the image zeros.
  __device__ __forceinline__ void relu() {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) pixel[i].relu();
  }

  // The gradient before ReLU from the one behind it: zero where `activated`, of which relu() was taken, is zero.
  __device__ __forceinline__ void clear_where_zero(const PixelRow& activated) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) pixel[i].clear_where_zero(activated.pixel[i]);
  }

  static __device__ __forceinline__ PixelRow round(const float (&values)[WIDTH][VEC]) {
    PixelRow row;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) row.pixel[i] = Pack<T, VEC>::round(values[i]);
    return row;
  }

  __device__ __forceinline__ void store(T* target, int64_t step, const Columns<WIDTH>& columns) const {
    if (columns.all()) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) store_pixel(target + i * step, i);
    } else {
      const Columns<WIDTH> some{kept(columns.first), columns.size};
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (some.has(i)) store_pixel(target + i * step, i);
      }
    }
  }

 private:
  __device__ __forceinline__ void store_pixel(T* target, int i) const {
    static_assert(sizeof(Pack<T, VEC>) % 4 == 0, "whole words are stored");
    uint32_t words[sizeof(Pack<T, VEC>) / 4];
    memcpy(static_cast<void*>(words), static_cast<const void*>(&pixel[i]), sizeof(words));
    store_global(target, words);
  }
};

// scale v + shift.
template <int WIDTH, int VEC>
__device__ __forceinline__ void affine(float (&values)[WIDTH][VEC], const float (&scale)[VEC],
                                       const float (&shift)[VEC]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) values[i][v] = fmaf(scale[v], values[i][v], shift[v]);
  }
}

}  // namespace xsep::cuda
