// Activations and their derivatives on vectors.
#pragma once

#include "../common/activation.h"
#include "vec.h"

namespace xsep::cpu {

/// act(scale * v + shift) per channel.
struct ChannelAffine {
  const float* scale = nullptr;  // [channels, padded], may be null
  const float* shift = nullptr;  // [channels, padded], may be null
  Activation activation = Activation::kIdentity;
  float alpha = 0;

  bool is_identity() const { return !scale && !shift && activation == Activation::kIdentity; }
};

/// v[i] = act(v[i]) for i in [0, n): the general case, out of line.
void activate_all(Vec* v, int n, Activation activation, float alpha);

/// u[i] = act'(u[i]) for i in [0, n); conventions at the kinks are PyTorch's.
void differentiate_all(Vec* u, int n, Activation activation, float alpha);

/// NaN stays NaN, as in PyTorch.
XSEP_INLINE Vec relu(Vec v) { return at_least(v, Vec{}); }

template <int N>
XSEP_INLINE void activate(Vec (&v)[N], Activation activation, float alpha) {
  if (activation == Activation::kIdentity) return;
  if (activation == Activation::kRelu) {
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) v[i] = relu(v[i]);
    return;
  }
  // A copy, so that the caller's vectors need not live in memory on the common paths.
  Vec spilled[N];
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) spilled[i] = v[i];
  activate_all(spilled, N, activation, alpha);
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) v[i] = spilled[i];
}

/// scale * v + shift of N vectors of the same channels, starting at channel c of the affine. Where there are both, in
/// one rounding, so that every kernel that reads a value finds the same sign.
template <int N>
XSEP_INLINE void scale_and_shift(const ChannelAffine& affine, int64_t c, Vec (&v)[N]) {
  if (affine.scale && affine.shift) {
    const Vec scale = load(affine.scale + c), shift = load(affine.shift + c);
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) v[i] = fma_for_certain(v[i], scale, shift);
  } else if (affine.scale) {
    const Vec scale = load(affine.scale + c);
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) v[i] = v[i] * scale;
  } else if (affine.shift) {
    const Vec shift = load(affine.shift + c);
    XSEP_UNROLL
    for (int i = 0; i < N; ++i) v[i] = v[i] + shift;
  }
}

/// The same and the activation.
template <int N>
XSEP_INLINE void apply(const ChannelAffine& affine, int64_t c, Vec (&v)[N]) {
  scale_and_shift(affine, c, v);
  activate(v, affine.activation, affine.alpha);
}

}  // namespace xsep::cpu
