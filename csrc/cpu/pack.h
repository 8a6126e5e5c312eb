// Rearrangements: weights into the kernels' order, a depth multiplier's passes back into channel order, and prologues
// that are dearer than a clamp applied to the whole of x.
#pragma once

#include <algorithm>

#include "../common/cpu_plan.h"
#include "../common/geometry.h"
#include "activate.h"

namespace xsep::cpu {

/// Position of channel j of C_mid = c * multiplier in the order of passes: pass j % multiplier, channel j / multiplier.
inline int64_t pass_order(int64_t j, int64_t multiplier, int64_t row) { return j % multiplier * row + j / multiplier; }

/// w_dw T [c * multiplier, taps] -> float [multiplier, taps, c_pad]; the padding is left as it is.
template <class T>
void pack_depthwise(const T* w_dw, int64_t c, int64_t multiplier, int64_t taps, int64_t c_pad, float* out) {
  for (int64_t j = 0; j < c * multiplier; ++j) {
    float* to = out + j % multiplier * taps * c_pad + j / multiplier;
    for (int64_t t = 0; t < taps; ++t) to[t * c_pad] = to_float(w_dw[j * taps + t]);
  }
}

/// The other way, rounding: sums [multiplier * taps, c_pad] -> dw T [c * multiplier, taps], channels of one pass's c.
template <class T>
void unpack_depthwise(const double* sums, Range channels, int64_t multiplier, int64_t taps, int64_t c_pad, T* dw) {
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    for (int64_t i = 0; i < multiplier; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        dw[(c * multiplier + i) * taps + t] = from_float<T>(static_cast<float>(sums[(i * taps + t) * c_pad + c]));
      }
    }
  }
}

/// Shape of the packed pointwise weights.
struct PointwisePacking {
  int64_t c_out, c, multiplier;
  int64_t depth;  // c * multiplier, or one more
  bool pairs;     // rows interleaved in pairs: [panels, depth / 2, kPanelColumns, 2]
};

/// One panel of w_pw T [c_out, c * multiplier], its rows in the order of passes, zeros beyond c_out and c * multiplier:
/// Out [depth, kPanelColumns], or pairs. Out is float, or T itself.
template <class T, class Out>
void pack_panel(const PointwisePacking& p, const T* w_pw, int64_t panel, Out* out) {
  constexpr int64_t kBlock = 16;  // of depth: rows of w_pw are read a cache line at a time
  const int64_t c_mid = p.c * p.multiplier;
  const int64_t n0 = panel * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, p.c_out - n0);
  const int64_t row_step = p.pairs ? 1 : kPanelColumns;
  const int64_t column_step = p.pairs ? 2 : 1;
  if (columns < kPanelColumns || p.depth > c_mid) std::fill(out, out + p.depth * kPanelColumns, Out{});
  for (int64_t k0 = 0; k0 < c_mid; k0 += kBlock) {
    const int64_t k_end = std::min(k0 + kBlock, c_mid);
    for (int64_t n = 0; n < columns; ++n) {
      const T* from = w_pw + (n0 + n) * c_mid;
      for (int64_t k = k0; k < k_end; ++k) {
        const int64_t row = p.multiplier == 1 ? k : pass_order(k, p.multiplier, p.c);
        const int64_t at = (p.pairs ? row / 2 * 2 * kPanelColumns + row % 2 : row * row_step) + n * column_step;
        if constexpr (std::is_same_v<T, Out>) {
          out[at] = from[k];
        } else {
          out[at] = to_float(from[k]);
        }
      }
    }
  }
}

/// Pixels [pixels.begin, pixels.end) of T [.., c] -> float [.., c], act(scale * x + shift).
template <class T>
void apply_prologue(const T* x, Range pixels, int64_t c_in, const ChannelAffine& affine, float* out) {
  for (int64_t pixel = pixels.begin; pixel < pixels.end; ++pixel) {
    for (int64_t c = 0; c < c_in; c += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, c_in - c);
      Vec v[1] = {load_first(x + pixel * c_in + c, lanes)};
      apply(affine, c, v);
      store_first(out + pixel * c_in + c, v[0], lanes);
    }
  }
}

/// count pixels of passes [count, multiplier, c] -> T [count, c * multiplier] in channel order.
template <class T>
void interleave_passes(const float* passes, int64_t count, int64_t c_in, int64_t multiplier, T* out) {
  for (int64_t pixel = 0; pixel < count; ++pixel) {
    const float* from = passes + pixel * c_in * multiplier;
    T* to = out + pixel * c_in * multiplier;
    for (int64_t i = 0; i < multiplier; ++i) {
      for (int64_t c = 0; c < c_in; ++c) to[c * multiplier + i] = from_float<T>(from[i * c_in + c]);
    }
  }
}

}  // namespace xsep::cpu
