// Division of indices by what is the same for a whole launch, in three instructions: a GPU has none that divides, and
// takes some twenty.
#pragma once

#include "geometry.h"

namespace xsep {

struct Divisor {
  int divisor, shift;
  uint32_t multiplier;  // 2^(31 + shift) / divisor, rounded up

  /// floor(i / divisor) for 0 <= i < 2^31. Of such an i the multiplier's rounding, less than 1 in 2^shift >= divisor,
  /// adds less than 1 / divisor to the quotient.
  XSEP_HOST_DEVICE constexpr int quotient(int i) const {
    return static_cast<int>(
        static_cast<uint32_t>(static_cast<uint64_t>(2 * static_cast<uint32_t>(i)) * multiplier >> 32) >> shift);
  }
};

/// Of divisors from 1 on.
constexpr Divisor divisor_of(int divisor) {
  int shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t power = uint64_t{1} << (31 + shift);
  return {divisor, shift, static_cast<uint32_t>((power + divisor - 1) / divisor)};
}

static_assert(divisor_of(1).quotient(0x7fffffff) == 0x7fffffff && divisor_of(7).quotient(0x7fffffff) == 306783378);
static_assert(divisor_of(0x7fffffff).quotient(0x7ffffffe) == 0 && divisor_of(0x7fffffff).quotient(0x7fffffff) == 1);

}  // namespace xsep
