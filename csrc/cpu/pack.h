// Rearrangements: weights into the kernels' order, a depth multiplier's passes back into channel order.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/cpu_plan.h"
#include "../common/geometry.h"
#include "activate.h"
#include "transpose.h"

namespace xsep::cpu {

/// Position of channel j of C_mid = c * multiplier in the order of passes: pass j % multiplier, channel j / multiplier.
inline int64_t pass_order(int64_t j, int64_t multiplier, int64_t row) { return j % multiplier * row + j / multiplier; }

namespace detail {

/// f(first, last, buffer) for blocks of channels whose filters, `filter` values a channel, fit a first-level cache as
/// float.
template <class F>
void by_blocks_of_filters(Range channels, int64_t filter, F&& f) {
  const int64_t step = std::max<int64_t>(4096 / filter, 1);
  std::vector<float> buffer(static_cast<size_t>(std::min(step, channels.end - channels.begin) * filter));
  for (int64_t c = channels.begin; c < channels.end; c += step) f(c, std::min(c + step, channels.end), buffer.data());
}

}  // namespace detail

/// w_dw T [c * multiplier, taps] -> float [multiplier, taps, c_pad]; the padding is left as it is.
template <class T>
void pack_depthwise(const T* w_dw, int64_t c, int64_t multiplier, int64_t taps, int64_t c_pad, float* out) {
  const int64_t filter = multiplier * taps;
  detail::by_blocks_of_filters({0, c}, filter, [&](int64_t first, int64_t last, float* buffer) {
    to_floats(w_dw + first * filter, (last - first) * filter, buffer);
    for (int64_t t = 0; t < filter; ++t) {
      for (int64_t i = first; i < last; ++i) out[t * c_pad + i] = buffer[(i - first) * filter + t];
    }
  });
}

/// The other way, rounding: sums [multiplier * taps, c_pad] -> dw T [c * multiplier, taps], channels of one pass's c.
template <class T>
void unpack_depthwise(const double* sums, Range channels, int64_t multiplier, int64_t taps, int64_t c_pad, T* dw) {
  const int64_t filter = multiplier * taps;
  detail::by_blocks_of_filters(channels, filter, [&](int64_t first, int64_t last, float* buffer) {
    for (int64_t t = 0; t < filter; ++t) {
      for (int64_t i = first; i < last; ++i) {
        buffer[(i - first) * filter + t] = static_cast<float>(sums[t * c_pad + i]);
      }
    }
    from_floats(buffer, (last - first) * filter, dw + first * filter);
  });
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
  const int64_t c_mid = p.c * p.multiplier;
  const int64_t n0 = panel * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, p.c_out - n0);
  if (columns < kPanelColumns || p.depth > c_mid) std::fill(out, out + p.depth * kPanelColumns, Out{});
  int64_t n_done = 0;
  int64_t k_done = 0;
  if constexpr (std::is_same_v<Out, float>) {
    // Squares through registers: each line of w_pw is read, and each of the panel written, once and whole.
    if (p.multiplier == 1 && !p.pairs) {
      n_done = columns - columns % kLanes;
      k_done = c_mid - c_mid % kLanes;
    }
    for (int64_t k = 0; k < k_done; k += kLanes) {
      for (int64_t n = 0; n < n_done; n += kLanes) {
        Vec v[kLanes];
        XSEP_UNROLL
        for (int i = 0; i < kLanes; ++i) v[i] = load(w_pw + (n0 + n + i) * c_mid + k);
        // Each row of the square is a stream of its own, more than the hardware follows.
        XSEP_UNROLL
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(w_pw + (n0 + n + i) * c_mid + k + 4 * kLanes, 0, 3);
        transpose(v);
        XSEP_UNROLL
        for (int i = 0; i < kLanes; ++i) store(out + (k + i) * kPanelColumns + n, v[i]);
      }
    }
  }
  const int64_t row_step = p.pairs ? 1 : kPanelColumns;
  const int64_t column_step = p.pairs ? 2 : 1;
  for (int64_t n = 0; n < columns; ++n) {
    const T* from = w_pw + (n0 + n) * c_mid;
    for (int64_t k = n < n_done ? k_done : 0; k < c_mid; ++k) {
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

/// Rows 2 i and 2 i + 1 of [rows, columns] with their elements interleaved, as row i of 32-bit elements, row_out apart.
/// An odd last row is paired with zeros.
inline void interleave_rows(const BFloat16* from, int64_t rows, int64_t row_step, int64_t columns, uint32_t* out,
                            int64_t row_out) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * row_step, out += row_out) {
    const bool alone = i + 1 == rows;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, columns - j);
      const VecBits even = as_bits(load_first(from + j, lanes)) >> 16;
      const VecBits odd = alone ? VecBits{} : as_bits(load_first(from + row_step + j, lanes));
      store_first(reinterpret_cast<float*>(out + j), as_float(even | odd), lanes);
    }
  }
}

namespace detail {

/// Each row of a panel of w_pw is a few lines in a page of its own, which the hardware does not foresee: one some rows
/// after row k is asked for. It may lie beyond the last, which does no harm.
template <class T>
void fetch_panel_row(const T* w_pw, int64_t c_mid, int64_t k, int64_t n0) {
  constexpr int64_t kAhead = 8;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  const auto at = reinterpret_cast<uintptr_t>(w_pw) + static_cast<uintptr_t>(((k + kAhead) * c_mid + n0) * kBytes);
  for (int64_t i = 0; i < kPanelColumns * kBytes; i += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(at + static_cast<uintptr_t>(i)), 0, 3);
  }
}

}  // namespace detail

/// One panel of w_pw [c_out, c_mid] itself, which dz = dv w_pw multiplies by: columns [panel * kPanelColumns, ..),
/// zeros beyond c_mid, as float [c_out, kPanelColumns] or pairs [c_out / 2, kPanelColumns], for which c_out is even.
template <class T>
void pack_transposed_panel(int64_t c_out, int64_t c_mid, const T* w_pw, int64_t panel, float* out) {
  const int64_t n0 = panel * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, c_mid - n0);
  for (int64_t k = 0; k < c_out; ++k, out += kPanelColumns) {
    detail::fetch_panel_row(w_pw, c_mid, k, n0);
    to_floats(w_pw + k * c_mid + n0, columns, out);
    std::fill(out + columns, out + kPanelColumns, 0.0f);
  }
}
inline void pack_transposed_panel(int64_t c_out, int64_t c_mid, const BFloat16* w_pw, int64_t panel, uint32_t* out) {
  const int64_t n0 = panel * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, c_mid - n0);
  if (columns < kPanelColumns) std::fill(out, out + c_out / 2 * kPanelColumns, 0u);
  for (int64_t k = 0; k < c_out; k += 2, out += kPanelColumns) {
    detail::fetch_panel_row(w_pw, c_mid, k, n0);
    detail::fetch_panel_row(w_pw, c_mid, k + 1, n0);
    interleave_rows(w_pw + k * c_mid + n0, 2, c_mid, columns, out, kPanelColumns);
  }
}

/// count pixels of passes [count, multiplier, c] -> T [count, c * multiplier] in channel order.
template <class T>
void interleave_passes(const float* passes, int64_t count, int64_t c_in, int64_t multiplier, T* out) {
  const int64_t channels = c_in * multiplier;
  std::vector<float> row(std::is_same_v<T, float> ? 0 : static_cast<size_t>(channels));
  for (int64_t pixel = 0; pixel < count; ++pixel, passes += channels, out += channels) {
    float* to = row.data();
    if constexpr (std::is_same_v<T, float>) to = out;
    for (int64_t i = 0; i < multiplier; ++i) {
      for (int64_t c = 0; c < c_in; ++c) to[c * multiplier + i] = passes[i * c_in + c];
    }
    if constexpr (!std::is_same_v<T, float>) from_floats(to, channels, out);
  }
}

}  // namespace xsep::cpu
