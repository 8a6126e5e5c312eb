// The end of a layer's input gradient, neighbouring pixels at a time: shortcut, activation's derivative, rounding,
// sums. The depthwise backward, the chain's fused backward and the gradient of a load alone end with it.
#pragma once

#include "activation.cuh"
#include "params.h"
#include "row.cuh"

namespace xsep::cuda {

// Where the first of some neighbouring pixels is in an image, and where its vector starts in memory.
struct PixelPlace {
  int64_t picture;
  int h, w;
  int64_t at;  // elements from the image's first
};

template <class T, int WIDTH, int VEC>
__device__ __forceinline__ void add_shortcut(float (&d)[WIDTH][VEC], const GradientEpilogue& epilogue,
                                             const PixelPlace& place, int height, int width, int channels, int c) {
  const Columns<WIDTH> columns{place.w, width};
  const T* shortcut = static_cast<const T*>(epilogue.shortcut);
  PixelRow<T, VEC, WIDTH> row;
  if (epilogue.shortcut_step != 2) {
    row.load(shortcut + place.at, channels, columns);
  } else {
    if (place.h % 2 != 0) return;
    const int64_t first = (place.picture * ((height + 1) / 2) + place.h / 2) * ((width + 1) / 2);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      const bool there = (place.w + i) % 2 == 0 && columns.has(i);
      row.pixel[i] =
          there ? Pack<T, VEC>::load(shortcut + (first + (place.w + i) / 2) * channels + c) : Pack<T, VEC>::zero();
    }
  }
  float other[WIDTH][VEC];
  row.widen(other);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) d[i][v] += other[i][v];
  }
}

// Adds d, rounded already and zero where there is no pixel, and d (operand - centre) to a thread's sums. x: the pixels
// of the image at x_image, which is an operand more often than not. centre(k): the centres of operand k.
template <class T, int WIDTH, int VEC, class Centre>
__device__ __forceinline__ void add_to_sums(float (&sums)[1 + kMostOperands][VEC], const float (&d)[WIDTH][VEC],
                                            const GradientEpilogue& epilogue, const void* x_image,
                                            const float (&x)[WIDTH][VEC], int64_t at, int channels,
                                            const Columns<WIDTH>& columns, Centre centre) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) sums[0][v] += d[i][v];
  }
#pragma unroll
  for (int k = 0; k < kMostOperands; ++k) {
    if (epilogue.operands[k] == nullptr) continue;
    float operand[WIDTH][VEC], middle[VEC];
    if (epilogue.operands[k] == x_image) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) operand[i][v] = x[i][v];
      }
    } else {
      PixelRow<T, VEC, WIDTH> row;
      row.load(static_cast<const T*>(epilogue.operands[k]) + at, channels, columns);
      row.widen(operand);
    }
    centre(k, middle);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) sums[1 + k][v] = fmaf(d[i][v], operand[i][v] - middle[v], sums[1 + k][v]);
    }
  }
}

// The image of x, and dx of the same layout.
struct InputImages {
  const void* x;
  void* dx;
  int height, width, channels;
};

// From d, the gradient of act(scale x + shift), to dx as it is stored, and its part of a thread's sums.
template <class T, int WIDTH, int VEC, class Centre>
__device__ __forceinline__ void finish_gradient(float (&d)[WIDTH][VEC], float (&sums)[1 + kMostOperands][VEC],
                                                const GradientEpilogue& epilogue, const InputImages& images,
                                                const PixelPlace& place, int c, const float (&x)[WIDTH][VEC],
                                                const float (&scale)[VEC], const float (&shift)[VEC],
                                                const ActivationChoice& activation, Centre centre) {
  const Columns<WIDTH> columns{place.w, images.width};
  const bool joins = epilogue.shortcut != nullptr, before = epilogue.before_mask != 0;
  if (joins && before) add_shortcut<T>(d, epilogue, place, images.height, images.width, images.channels, c);
  float slope[WIDTH][VEC];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) slope[i][v] = fmaf(scale[v], x[i][v], shift[v]);
  }
  multiply_by_slope(d, slope, activation);
  if (joins && !before) add_shortcut<T>(d, epilogue, place, images.height, images.width, images.channels, c);
  columns.clear_others(d);
  const auto rounded = PixelRow<T, VEC, WIDTH>::round(d);
  rounded.store(static_cast<T*>(images.dx) + place.at, images.channels, columns);
  rounded.widen(d);
  add_to_sums<T>(sums, d, epilogue, images.x, x, place.at, images.channels, columns, centre);
}

}  // namespace xsep::cuda
