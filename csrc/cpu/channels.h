// Loops over the channels of pixels next to each other in NHWC.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace xsep::cpu {

/// f(c, N, lanes) for vectors of channels from c on: N of them side by side, all whole, or one of so many lanes. N is
/// an integral_constant.
template <class F>
XSEP_INLINE void by_vectors(int64_t channels, F&& f) {
  constexpr int kSome = 4;
  int64_t c = 0;
  for (; c + kSome * kLanes <= channels; c += kSome * kLanes) f(c, std::integral_constant<int, kSome>{}, kLanes);
  for (; c + kLanes <= channels; c += kLanes) f(c, std::integral_constant<int, 1>{}, kLanes);
  if (c < channels) f(c, std::integral_constant<int, 1>{}, static_cast<int>(channels - c));
}

/// The first lanes of a vector, most often all of them.
template <class T>
XSEP_INLINE Vec load_lanes(const T* p, int64_t lanes) {
  return lanes == kLanes ? load(p) : load_first(p, lanes);
}
template <class T>
XSEP_INLINE void store_lanes(T* p, Vec v, int64_t lanes) {
  lanes == kLanes ? store(p, v) : store_first(p, v, lanes);
}

}  // namespace xsep::cpu
