// The training chain's gradients pixel by pixel: that of a raw output, which the products read, and a layer's input's,
// once the convolutions are done.
#pragma once

#include "activate.h"
#include "chain_pool.h"
#include "channels.h"

namespace xsep::cpu {

/// dr = a * du + b * r + d, rounded.
struct RawGradient {
  int64_t channels;
  const void* du;       // T [pixels, c], or [n, p, q, c] beside taps
  const uint8_t* taps;  // [n, p, q, c] of a pool in front of du; may be null
  PoolShape pool;
  const void* r;      // T [pixels, c]
  const float* coef;  // [3, c]: a, b, d
  void* dr;           // T [pixels, c]
};

/// Pixels [pixels.begin, pixels.end).
template <class T>
void raw_gradient(const RawGradient& p, Range pixels) {
  const int64_t channels = p.channels;
  const T* const du = static_cast<const T*>(p.du);
  const float* const a = p.coef;
  const float* const b = a + channels;
  const float* const d = b + channels;
  for (int64_t i = pixels.begin; i < pixels.end; ++i) {
    const T* r = static_cast<const T*>(p.r) + i * channels;
    T* dr = static_cast<T*>(p.dr) + i * channels;
    const auto form = [&](auto du_at) __attribute__((always_inline)) {
      by_vectors(channels, [&](int64_t first, auto count, int lanes) __attribute__((always_inline)) {
        constexpr int kVectors = count();
        XSEP_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          const int64_t c = first + j * kLanes;
          const Vec rest = fma(load_lanes(r + c, lanes), load_lanes(b + c, lanes), load_lanes(d + c, lanes));
          store_lanes(dr + c, fma(du_at(c, lanes), load_lanes(a + c, lanes), rest), lanes);
        }
      });
    };
    if (p.taps) {
      const Pooled pooled(p.pool, i);
      form([&](int64_t c, int lanes)
               __attribute__((always_inline)) { return pooled.gradient(du, p.taps, channels, c, lanes); });
    } else {
      form([&](int64_t c, int lanes)
               __attribute__((always_inline)) { return load_lanes(du + i * channels + c, lanes); });
    }
  }
}

/// dx of e, the gradient that the depthwise convolution gives: dx = e + g, or dx = act'(u) * (e + g) where the
/// shortcut was taken behind the activation.
struct InputGradient {
  int64_t channels, h, w;
  void* dx;              // T [n, h, w, c]: e, and dx in its place
  const void* shortcut;  // g, T [n, h, w, c], or [n, ceil(h / 2), ceil(w / 2), c] where half; may be null
  bool half;             // of every second row and column
  const void* x;         // T [n, h, w, c]; null where e has act'(u) in it
  ChannelAffine load;    // u and its activation; scale and shift [c_pad]
};

namespace detail {

/// g at a pixel, or null.
template <class T>
const T* shortcut_at(const InputGradient& p, int64_t pixel) {
  const T* g = static_cast<const T*>(p.shortcut);
  if (!g || !p.half) return g ? g + pixel * p.channels : nullptr;
  const int64_t n = pixel / (p.h * p.w), h = pixel / p.w % p.h, w = pixel % p.w;
  if (h % 2 != 0 || w % 2 != 0) return nullptr;
  return g + ((n * ceil_div(p.h, 2) + h / 2) * ceil_div(p.w, 2) + w / 2) * p.channels;
}

}  // namespace detail

/// Pixels [pixels.begin, pixels.end).
template <class T>
void input_gradient(const InputGradient& p, Range pixels) {
  for (int64_t i = pixels.begin; i < pixels.end; ++i) {
    const T* const g = detail::shortcut_at<T>(p, i);
    const T* const x = p.x ? static_cast<const T*>(p.x) + i * p.channels : nullptr;
    T* const dx = static_cast<T*>(p.dx) + i * p.channels;
    if (!g && !x) continue;
    by_vectors(p.channels, [&](int64_t c, auto count, int lanes) __attribute__((always_inline)) {
      constexpr int kVectors = count();
      Vec v[kVectors];
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        v[j] = load_lanes(dx + c + j * kLanes, lanes);
        if (g) v[j] = v[j] + load_lanes(g + c + j * kLanes, lanes);
      }
      if (x) {
        Vec u[kVectors];
        XSEP_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          Vec one[1] = {load_lanes(x + c + j * kLanes, lanes)};
          scale_and_shift(p.load, c + j * kLanes, one);
          u[j] = one[0];
        }
        differentiate_all(u, kVectors, p.load.activation, p.load.alpha);
        XSEP_UNROLL
        for (int j = 0; j < kVectors; ++j) v[j] = v[j] * u[j];
      }
      XSEP_UNROLL
      for (int j = 0; j < kVectors; ++j) store_lanes(dx + c + j * kLanes, v[j], lanes);
    });
  }
}

}  // namespace xsep::cpu
