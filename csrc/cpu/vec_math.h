// Elementary functions on vectors, to one or two units in the last place of float32.
#pragma once

#include "vec.h"

namespace xsep::cpu {

/// exp(x) = scale_a * scale_b * (1 + fraction), the scales powers of two whose product may lie outside float's range.
struct ExpParts {
  Vec fraction;
  Vec scale_a;
  Vec scale_b;
};

XSEP_INLINE Vec power_of_two(VecInt exponent) { return reinterpret_cast<Vec>((exponent + 127) << 23); }

/// x = n ln 2 + f with |f| <= ln 2 / 2; the fraction exp(f) - 1 is Taylor's series to the seventh power, whose
/// remainder 0.347^8 / 8! = 5e-9 is below half a unit in the last place.
XSEP_INLINE ExpParts exp_parts(Vec x) {
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62ep-1f;  // ln 2 to 13 bits: n * kLn2High is exact
  constexpr float kLn2Low = 0x1.0bfbe8p-15f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = at_most(at_least(x, broadcast(-104.0f)), broadcast(89.0f));
  const Vec shifted = fma(x, broadcast(kLog2E), broadcast(kRound));
  const VecInt n = reinterpret_cast<VecInt>(shifted) - reinterpret_cast<VecInt>(broadcast(kRound));
  const Vec whole = shifted - kRound;
  const Vec f = fma(whole, broadcast(-kLn2Low), fma(whole, broadcast(-kLn2High), x));
  Vec series = broadcast(1.0f / 5040);
  series = fma(series, f, broadcast(1.0f / 720));
  series = fma(series, f, broadcast(1.0f / 120));
  series = fma(series, f, broadcast(1.0f / 24));
  series = fma(series, f, broadcast(1.0f / 6));
  series = fma(series, f, broadcast(0.5f));
  const VecInt half = n >> 1;
  return {fma(series * f, f, f), power_of_two(half), power_of_two(n - half)};
}

/// 0 and infinity where float ends; NaN of NaN.
XSEP_INLINE Vec exp(Vec x) {
  const ExpParts e = exp_parts(x);
  return (1.0f + e.fraction) * e.scale_a * e.scale_b;
}

/// exp(x) - 1 for x <= 0, right to a few units in the last place near zero too.
XSEP_INLINE Vec expm1_negative(Vec x) {
  const ExpParts e = exp_parts(x);
  const Vec scale = e.scale_a * e.scale_b;
  return fma(e.fraction, scale, scale - 1.0f);
}

XSEP_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

/// sigmoid(x) and 1 - sigmoid(x), both right where they are small.
struct SigmoidPair {
  Vec value;
  Vec complement;
};

XSEP_INLINE SigmoidPair sigmoid_pair(Vec x) {
  const Vec e = exp(x > 0.0f ? -x : x);
  const Vec large = 1.0f / (1.0f + e);
  const Vec small = e * large;
  return {x > 0.0f ? large : small, x > 0.0f ? small : large};
}

/// erf(x) to 1.2e-7. Below 1 an odd polynomial, above it 1 - exp(polynomial); the coefficients are least-squares fits
/// of erf(x) / x in x^2 and of log(erfc(x)) in x, reweighted until the largest absolute error of erf is the least
/// (1e-9 and 2e-9 before rounding).
XSEP_INLINE Vec erf(Vec x) {
  const Vec a = as_float(as_bits(x) & 0x7fffffffu);
  const Vec square = a * a;
  Vec small = broadcast(7.889122935011983e-05f);
  small = fma(small, square, broadcast(-8.020842215046287e-04f));
  small = fma(small, square, broadcast(5.189535673707724e-03f));
  small = fma(small, square, broadcast(-2.6854444295167923e-02f));
  small = fma(small, square, broadcast(1.1283600330352783e-01f));
  small = fma(small, square, broadcast(-3.761262595653534e-01f));
  small = a * fma(small, square, broadcast(1.1283791065216064f));
  const Vec b = at_most(a, broadcast(4.1f));
  Vec log_erfc = broadcast(0.00018557407020125538f);
  log_erfc = fma(log_erfc, b, broadcast(-0.002939607948064804f));
  log_erfc = fma(log_erfc, b, broadcast(0.02180531993508339f));
  log_erfc = fma(log_erfc, b, broadcast(-0.10303737223148346f));
  log_erfc = fma(log_erfc, b, broadcast(-0.6382256746292114f));
  log_erfc = fma(log_erfc, b, broadcast(-1.1270400285720825f));
  log_erfc = fma(log_erfc, b, broadcast(-0.0003537187003530562f));
  const Vec magnitude = a < 1.0f ? small : 1.0f - exp(log_erfc);
  return as_float(as_bits(magnitude) | (as_bits(x) & 0x80000000u));
}

}  // namespace xsep::cpu
