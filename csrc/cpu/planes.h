// Pixels of NCHW tensors in a thread's own memory: turned round to NHWC and back, or plane by plane as they are.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../common/geometry.h"
#include "transpose.h"

namespace xsep::cpu {

/// T [n, c, size]: pixels are counted over all pictures.
template <class T>
struct Planes {
  T* data;
  int64_t c;
  int64_t size;  // of a plane, in pixels

  /// f(their address in plane 0 of their picture, how many, index of the first) for those of each picture.
  template <class F>
  void by_pictures(Range pixels, F&& f) const {
    for (int64_t pixel = pixels.begin; pixel < pixels.end;) {
      const int64_t picture = pixel / size, first = pixel - picture * size;
      const int64_t count = std::min(size - first, pixels.end - pixel);
      f(data + picture * c * size + first, count, pixel - pixels.begin);
      pixel += count;
    }
  }
};

/// Channels of pixels to NHWC: channels.begin of the first pixel to `to`, that of the next one `step` elements on, as
/// To: float, or T itself.
template <class To, class T>
void pixels_from_planes(const Planes<const T>& planes, Range pixels, Range channels, To* to, int64_t step) {
  const int64_t count = channels.end - channels.begin;
  planes.by_pictures(pixels, [&](const T* from, int64_t n, int64_t first) {
    from += channels.begin * planes.size;
    // Few planes at a time, each read as a stream.
    for (int64_t c = 0; c < count; c += kLanes) {
      const int64_t at = count < kLanes ? 0 : std::min(c, count - kLanes);
      transpose_matrix<true>(from + at * planes.size, std::min<int64_t>(count, kLanes), n, planes.size,
                             to + first * step + at, step);
    }
  });
}

/// The other way.
template <class T>
void pixels_to_planes(const T* from, int64_t step, const Planes<T>& planes, Range pixels, Range channels) {
  planes.by_pictures(pixels, [&](T* to, int64_t n, int64_t first) {
    transpose_matrix(from + first * step, n, channels.end - channels.begin, step, to + channels.begin * planes.size,
                     planes.size);
  });
}

/// All planes' pieces of pixels below each other, `step` elements apart, as To: float, or T itself.
template <class To, class T>
void copy_planes(const Planes<const T>& planes, Range pixels, To* to, int64_t step) {
  constexpr int64_t kAhead = 6;  // planes: each piece is a short stream of its own, which the hardware does not foresee
  planes.by_pictures(pixels, [&](const T* from, int64_t n, int64_t first) {
    for (int64_t c = 0; c < planes.c; ++c, from += planes.size) {
      const T* soon = from + kAhead * planes.size;
      for (int64_t i = 0; i < n; i += kLineBytes / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(soon + i, 0, 2);
      To* out = to + c * step + first;
      if constexpr (std::is_same_v<T, To>) {
        std::memcpy(out, from, static_cast<size_t>(n) * sizeof(T));
      } else {
        to_floats(from, n, out);
      }
    }
  });
}

}  // namespace xsep::cpu
