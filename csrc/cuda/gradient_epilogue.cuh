// The end of a layer's input gradient, one vector of one pixel at a time: shortcut, activation's derivative, rounding,
// sums. Both the depthwise backward and the gradient of a load alone end with it.
#pragma once

#include "activation.cuh"
#include "numeric.cuh"
#include "params.h"

namespace xsep::cuda {

// A pixel of an image, and where its vector starts in memory.
struct PixelPlace {
  int64_t picture;
  int h, w;
  int64_t at;  // elements from the image's first
};

template <class T, int VEC>
__device__ __forceinline__ void add_shortcut(float (&d)[VEC], const GradientEpilogue& epilogue, const PixelPlace& place,
                                             int height, int width, int channels, int c) {
  int64_t at = place.at;
  if (epilogue.shortcut_step == 2) {
    if (place.h % 2 != 0 || place.w % 2 != 0) return;
    at = ((place.picture * ((height + 1) / 2) + place.h / 2) * ((width + 1) / 2) + place.w / 2) * channels + c;
  }
  float other[VEC];
  read_pixel<T>(other, epilogue.shortcut, at);
#pragma unroll
  for (int v = 0; v < VEC; ++v) d[v] += other[v];
}

// Adds d, rounded already, and d (operand - centre) to a thread's sums. x: the pixel of the image at x_image, which is
// an operand more often than not. centre(k): the centres of operand k.
template <class T, int VEC, class Centre>
__device__ __forceinline__ void add_to_sums(float (&sums)[1 + kMostOperands][VEC], const float (&d)[VEC],
                                            const GradientEpilogue& epilogue, const void* x_image,
                                            const float (&x)[VEC], int64_t at, Centre centre) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) sums[0][v] += d[v];
#pragma unroll
  for (int k = 0; k < kMostOperands; ++k) {
    if (epilogue.operands[k] == nullptr) continue;
    float operand[VEC], middle[VEC];
    if (epilogue.operands[k] == x_image) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) operand[v] = x[v];
    } else {
      read_pixel<T>(operand, epilogue.operands[k], at);
    }
    centre(k, middle);
#pragma unroll
    for (int v = 0; v < VEC; ++v) sums[1 + k][v] = fmaf(d[v], operand[v] - middle[v], sums[1 + k][v]);
  }
}

// The image of x, and dx of the same layout.
struct InputImages {
  const void* x;
  void* dx;
  int height, width, channels;
};

// From d, the gradient of act(scale x + shift), to dx as it is stored, and its part of a thread's sums.
template <class T, int VEC, class Centre>
__device__ __forceinline__ void finish_gradient(float (&d)[VEC], float (&sums)[1 + kMostOperands][VEC],
                                                const GradientEpilogue& epilogue, const InputImages& images,
                                                const PixelPlace& place, int c, const float (&x)[VEC],
                                                const float (&scale)[VEC], const float (&shift)[VEC],
                                                const ActivationChoice& activation, Centre centre) {
  const bool joins = epilogue.shortcut != nullptr, before = epilogue.before_mask != 0;
  if (joins && before) add_shortcut<T>(d, epilogue, place, images.height, images.width, images.channels, c);
  float slope[VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) slope[v] = fmaf(scale[v], x[v], shift[v]);
  activation_slope(slope, activation);
#pragma unroll
  for (int v = 0; v < VEC; ++v) d[v] *= slope[v];
  if (joins && !before) add_shortcut<T>(d, epilogue, place, images.height, images.width, images.channels, c);
  const auto rounded = Pack<T, VEC>::round(d);
  rounded.store(static_cast<T*>(images.dx) + place.at);
  rounded.widen(d);
  add_to_sums<T>(sums, d, epilogue, images.x, x, place.at, centre);
}

}  // namespace xsep::cuda
