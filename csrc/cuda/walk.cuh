// Where a thread's pixels and elements lie, from one to the next by additions: a GPU has no instruction that divides
// integers, and takes twenty for it, of large 64-bit ones a hundred, each waiting for the one before.
#pragma once

#include "device.cuh"

namespace xsep::cuda {

// Pixels first, first + step, ... of pictures of one size.
class PixelWalk {
 public:
  int64_t picture;
  unsigned row, column;

  __device__ __forceinline__ PixelWalk(int64_t first, int64_t step, int height, int width)
      : height_(static_cast<unsigned>(height)), width_(static_cast<unsigned>(width)) {
    split(first, picture, row, column);
    split(step, pictures_on_, rows_on_, columns_on_);
  }

  // further: 0, or 1 for one pixel more than a step.
  __device__ __forceinline__ void advance(unsigned further = 0) {
    column += columns_on_ + further, row += rows_on_, picture += pictures_on_;
    if (column >= width_) column -= width_, ++row;
    if (row >= height_) row -= height_, ++picture;
  }

 private:
  unsigned height_, width_;
  int64_t pictures_on_;
  unsigned rows_on_, columns_on_;

  __device__ __forceinline__ void split(int64_t pixel, int64_t& picture, unsigned& row, unsigned& column) const {
    const int64_t rows = pixel / width_;
    column = static_cast<unsigned>(pixel - rows * width_);
    picture = rows / height_;
    row = static_cast<unsigned>(rows - picture * height_);
  }
};

// Elements first, first + step, ... of [pictures, height, width, channels].
class ElementWalk {
 public:
  PixelWalk pixel;
  unsigned channel;

  __device__ __forceinline__ ElementWalk(int64_t first, int64_t step, int height, int width, int channels)
      : pixel(first / channels, step / channels, height, width),
        channel(static_cast<unsigned>(first % channels)),
        channels_(static_cast<unsigned>(channels)),
        channels_on_(static_cast<unsigned>(step % channels)) {}

  __device__ __forceinline__ void advance() {
    channel += channels_on_;
    const bool passed = channel >= channels_;
    if (passed) channel -= channels_;
    pixel.advance(passed ? 1 : 0);
  }

 private:
  unsigned channels_, channels_on_;
};

}  // namespace xsep::cuda
