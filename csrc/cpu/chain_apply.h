// The training chain's images as ordinary tensors: what a raw output stands for, with what is added to it.
#pragma once

#include "../common/geometry.h"
#include "activate.h"
#include "channels.h"

namespace xsep::cpu {

/// y = act(scale * x + shift + residual), rounded.
struct ChainApply {
  int64_t channels;
  const void* x;         // T [pixels, c]
  ChannelAffine load;    // scale and shift [c_pad]
  const void* residual;  // T [pixels, c]; may be null
  void* y;               // T [pixels, c]
};

/// Pixels [pixels.begin, pixels.end).
template <class T>
void chain_apply(const ChainApply& p, Range pixels) {
  for (int64_t i = pixels.begin; i < pixels.end; ++i) {
    const T* x = static_cast<const T*>(p.x) + i * p.channels;
    const T* t = p.residual ? static_cast<const T*>(p.residual) + i * p.channels : nullptr;
    T* y = static_cast<T*>(p.y) + i * p.channels;
    by_vectors(p.channels, [&](int64_t c, auto count, int lanes) __attribute__((always_inline)) {
      constexpr int kVectors = count();
      Vec u[kVectors];
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = c + j * kLanes;
        Vec v[1] = {load_lanes(x + at, lanes)};
        scale_and_shift(p.load, at, v);
        u[j] = t ? v[0] + load_lanes(t + at, lanes) : v[0];
      }
      activate(u, p.load.activation, p.load.alpha);
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) store_lanes(y + c + j * kLanes, u[j], lanes);
    });
  }
}

}  // namespace xsep::cpu
