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

/// f(border) for channels [begin, end) of a block, kStep at a time: at the picture's border in one piece; inside it the
/// whole steps, then what is left as at the border, where it is looked at how much there is. f finds its channels in
/// begin and end.
template <int64_t kStep, class F>
XSEP_INLINE void with_border(bool border, int64_t& begin, int64_t& end, F&& f) {
  const int64_t all = end;
  if (!border) {
    end -= (end - begin) % kStep;
    if (begin < end) f(std::false_type{});
    begin = end;
    end = all;
  }
  if (begin < end) f(std::true_type{});
}

/// The first lanes of a vector.
template <class T>
XSEP_INLINE Vec load_lanes(const T* p, int64_t lanes) {
  return incomplete(lanes) ? load_first(p, lanes) : load(p);
}
template <class T>
XSEP_INLINE void store_lanes(T* p, Vec v, int64_t lanes) {
  incomplete(lanes) ? store_first(p, v, lanes) : store(p, v);
}

}  // namespace xsep::cpu
