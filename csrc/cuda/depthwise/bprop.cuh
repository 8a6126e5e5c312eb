// Depthwise backward, fast path: dx, dw_dw and the prologue's sums in one pass over x and dz.
//
// A thread walks down kStripWidth neighbouring columns of x, for one vector of channels, STRIDE rows a step. The dz
// values that its dx is made of are the ones its x meets in dw_dw, so both come from the same registers, through which
// the rows of dz slide: where registers allow it, each is loaded once, while the row before it is used. A strip starts
// where an even tap falls on its first pixel: which tap joins which x and dz is then known at compile time, for stride
// 2 too. The sums for dw_dw stay in registers over all of a CTA's tiles, are added over the CTA in a fixed order, and
// leave as one partial; a second kernel adds the partials.
#pragma once

#include <type_traits>

#include "../gradient_epilogue.cuh"
#include "../launch.cuh"
#include "../row.cuh"
#include "params.h"
#include "strip.cuh"

namespace xsep::cuda {

// The rows of dz that reach the rows of x of one step. With TURNS the newest comes in the place of the oldest, rather
// than that all the others move; where that is has to be known at compile time, so each place has code of its own.
template <class T, int K, int STRIDE, int VEC, bool TURNS>
class DzRows {
 public:
  static constexpr int kRows = DzReach<K, STRIDE>::kBefore + 1, kWidth = DzReach<K, STRIDE>::kWidth;
  using Row = PixelRow<T, VEC, kWidth>;

  // Row i of the first step, whose last is the newest.
  __device__ __forceinline__ void begin(int i, const Row& row) { row.widen(row_[TURNS ? i : i + 1]); }

  // Takes in the newest row of a step, then calls f(i, row i from the oldest on).
  template <class Function>
  __device__ __forceinline__ void add(int step, const Row& newest, Function f) {
    if constexpr (TURNS) {
      add_at<0>((static_cast<unsigned>(step) + kRows - 1) % kRows, newest, f);
    } else {
#pragma unroll
      for (int i = 0; i + 1 < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) row_[i][j][v] = row_[i + 1][j][v];
        }
      }
      add_at<kRows - 1>(kRows - 1, newest, f);
    }
  }

 private:
  float row_[kRows][kWidth][VEC];

  template <int PLACE, class Function>
  __device__ __forceinline__ void add_at(unsigned place, const Row& newest, Function f) {
    if constexpr (PLACE + 1 < kRows) {
      if (place != PLACE) return add_at<PLACE + 1>(place, newest, f);
    }
    newest.widen(row_[PLACE]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) f(i, row_[(PLACE + 1 + i) % kRows]);
  }
};

template <class T, int K, int STRIDE, int VEC>
__global__ void __launch_bounds__(kDepthwiseThreads, kBpropCtasPerSm)
    depthwise_bprop_kernel(const __grid_constant__ DepthwiseBpropParams p) {
  constexpr int kTaps = K * K;
  constexpr int kBefore = DzReach<K, STRIDE>::kBefore, kWidth = DzReach<K, STRIDE>::kWidth;
  // Else the rows of dz would leave no registers for the sums: each is loaded again for every row of x that it reaches.
  constexpr bool kKeepsRows = K < 7 || STRIDE == 2;
  // Rows of the next step are loaded while this one's are used, and x is kept beside its activation; but as the
  // registers allow: else x is read again, from L1.
  constexpr bool kKeepsX = sizeof(T) == 2, kLoadsDzAhead = K < 7,
                 kLoadsXAhead = kLoadsDzAhead && kKeepsX && STRIDE == 1;
  // Turning takes code for each place, and a register, which the others do not have.
  constexpr bool kTurns = STRIDE == 1 && (K == 5 || std::is_same<T, __nv_bfloat16>::value);
  using Table = ChannelTable<VEC, kBpropVectors>;
  using XRow = PixelRow<T, VEC, kStripWidth>;
  using DzRow = PixelRow<T, VEC, kWidth>;

  const ConvShape& s = p.shape;
  const int vectors = p.plan.vectors, strips = p.plan.strips_down * p.plan.strips_across;
  SharedArena arena;
  const Table weights(arena.take<float>(Table::size(kTaps, kBpropVectors)));
  const Table affines(arena.take<float>(Table::size(2 + kMostOperands, kBpropVectors)));
  const SharedBuffer<float> scratch = arena.take<float>(K * strips * vectors * VEC);
  const int first = static_cast<int>(blockIdx.y) * vectors * VEC;
  load_weights<T>(weights, p.w_dw, kTaps, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 0, p.prologue.scale, 1.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 1, p.prologue.shift, 0.0f, first, s.c_in, vectors);
  // The training chain has a centre for each operand.
  const bool in_chain = p.epilogue.sums > 0;
  for (int k = 0; k < kMostOperands; ++k) {
    const float* of_operand =
        k + 1 < p.epilogue.sums ? p.epilogue.centres + static_cast<int64_t>(k + 1) * s.c_in : nullptr;
    const float* centres = in_chain || k > 0 ? of_operand : p.centre;
    load_channel_vector<T>(affines, 2 + k, ChannelVector{centres, 1}, 0.0f, first, s.c_in, vectors);
  }
  __syncthreads();

  const int vector = static_cast<int>(threadIdx.x) % vectors, strip = static_cast<int>(threadIdx.x) / vectors;
  const int c = first + vector * VEC;
  const bool active = strip < strips && c < s.c_in;
  const bool with_sums = in_chain || p.dscale != nullptr || p.dshift != nullptr;
  const bool with_affine = p.prologue.scale.data != nullptr || p.prologue.shift.data != nullptr;
  const ActivationChoice activation{p.prologue.activation, p.prologue.alpha};
  const bool plain_relu = activation.code == Activation::kRelu && !with_affine;
  const int64_t x_row_length = static_cast<int64_t>(s.w) * s.c_in, dz_row_length = static_cast<int64_t>(s.q) * s.c_mid;

  float dw[kTaps][VEC] = {};
  float sums[kMostGradientSums][VEC] = {};  // for the scale, for the shift; or the chain's
  const int tiles = s.n * p.plan.tiles_down * p.plan.tiles_across;
  for (int tile = static_cast<int>(blockIdx.x); active && tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int tile_q = tile % p.plan.tiles_across, rest = tile / p.plan.tiles_across;
    const int tile_p = rest % p.plan.tiles_down;
    const int64_t picture = rest / p.plan.tiles_down;
    const int row = (tile_p * p.plan.strips_down + strip / p.plan.strips_across) * p.plan.strip_rows;
    const int column = (tile_q * p.plan.strips_across + strip % p.plan.strips_across) * kStripWidth;
    const int h0 = row - s.pad_top % STRIDE, w0 = column - s.pad_left % STRIDE;
    if (h0 >= s.h || w0 >= s.w) continue;
    const int steps = (min(p.plan.strip_rows, s.h - h0) + STRIDE - 1) / STRIDE;
    const int p0 = row / STRIDE + s.pad_top / STRIDE - kBefore, q0 = column / STRIDE + s.pad_left / STRIDE - kBefore;
    const Columns<kStripWidth> columns{w0, s.w};
    const Columns<kWidth> dz_columns{q0, s.q};
    const T* dz = static_cast<const T*>(p.dz) + ((picture * s.p + p0) * s.q + q0) * s.c_mid + c;
    int64_t at = ((picture * s.h + h0) * s.w + w0) * s.c_in + c;  // of the step's first pixel in x
    const auto is_row = [&](int i) { return static_cast<unsigned>(h0 + i) < static_cast<unsigned>(s.h); };
    const auto load_x = [&](XRow& into, int64_t from, int i) {
      if (is_row(i)) {
        into.load(static_cast<const T*>(p.x) + from, s.c_in, columns);
      } else {
        into.clear();
      }
    };
    const auto load_dz = [&](DzRow& into, const T* from, int i) {
      if (static_cast<unsigned>(p0 + i) < static_cast<unsigned>(s.p)) {
        into.load(from, s.c_mid, dz_columns);
      } else {
        into.clear();
      }
    };

    DzRows<T, K, STRIDE, VEC, kTurns> window;
    XRow next_x[STRIDE];
    DzRow next_dz;
    if (kKeepsRows) {
#pragma unroll
      for (int i = 0; i < kBefore; ++i) {
        load_dz(next_dz, dz, i);
        window.begin(i, next_dz);
        dz += dz_row_length;
      }
    }
    const auto load_xs = [&](int step, int64_t from) {
#pragma unroll
      for (int y = 0; y < STRIDE; ++y) load_x(next_x[y], from + y * x_row_length, step * STRIDE + y);
    };
    if (kLoadsDzAhead) load_dz(next_dz, dz, kBefore);
    if (kLoadsXAhead) load_xs(0, at);

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (kKeepsRows && !kLoadsDzAhead) load_dz(next_dz, dz, step + kBefore);
      if (!kLoadsXAhead) load_xs(step, at);
      XRow raw[STRIDE];
#pragma unroll
      for (int y = 0; y < STRIDE; ++y) raw[y] = next_x[y];
      const DzRow newest = next_dz;
      dz += dz_row_length;
      if (step + 1 < steps) {
        if (kLoadsDzAhead) load_dz(next_dz, dz, step + 1 + kBefore);
        if (kLoadsXAhead) load_xs(step + 1, at + STRIDE * x_row_length);
      }

      float scale[VEC], shift[VEC];
      affines.read(scale, 0, vector);
      affines.read(shift, 1, vector);
      float x[STRIDE][kStripWidth][VEC];
#pragma unroll
      for (int y = 0; y < STRIDE; ++y) {
        if (plain_relu) {
          XRow activated = raw[y];
          activated.relu();
          activated.widen(x[y]);
          continue;
        }
        raw[y].widen(x[y]);
        if (!is_row(step * STRIDE + y)) continue;
        if (with_affine) affine(x[y], scale, shift);
        activate_groups(x[y], activation);
        if (with_affine) columns.clear_others(x[y]);
      }

      float dx[STRIDE][kStripWidth][VEC] = {};
      if (kKeepsRows) {
        window.add(step, newest, [&](int i, const float (&dz_row)[kWidth][VEC]) {
          add_dz_row<K, STRIDE>(dx, dw, x, dz_row, i, weights, vector);
        });
      } else {
#pragma unroll
        for (int i = 0; i <= kBefore; ++i) {
          // A branch keeps the loads of one row apart from the next: all rows at once would spill.
          if (static_cast<unsigned>(p0 + step + i) >= static_cast<unsigned>(s.p)) continue;
          load_dz(next_dz, dz + (i - 1) * dz_row_length, step + i);
          float dz_row[kWidth][VEC];
          next_dz.widen(dz_row);
          add_dz_row<K, STRIDE>(dx, dw, x, dz_row, i, weights, vector);
        }
      }

      if (p.dx != nullptr || with_sums) {
#pragma unroll
        for (int y = 0; y < STRIDE; ++y) {
          const int i = step * STRIDE + y;
          if (!is_row(i)) continue;
          const int64_t place = at + y * x_row_length;
          float value[kStripWidth][VEC];
          if (!kKeepsX) load_x(raw[y], place, i);
          raw[y].widen(value);
          if (in_chain) {
            // Half by half: all at once take more registers than are left.
            constexpr int kHalf = kStripWidth / 2;
#pragma unroll
            for (int j = 0; j < kStripWidth; j += kHalf) {
              float d[kHalf][VEC], x_half[kHalf][VEC];
#pragma unroll
              for (int k = 0; k < kHalf; ++k) {
#pragma unroll
                for (int v = 0; v < VEC; ++v) d[k][v] = dx[y][j + k][v], x_half[k][v] = value[j + k][v];
              }
              finish_gradient<T>(d, sums, p.epilogue, {p.x, p.dx, s.h, s.w, s.c_in},
                                 {picture, h0 + i, w0 + j, place + j * s.c_in}, c, x_half, scale, shift, activation,
                                 [&](int k, float (&middle)[VEC]) { affines.read(middle, 2 + k, vector); });
            }
            continue;
          }
          float slope[kStripWidth][VEC];
#pragma unroll
          for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
            for (int v = 0; v < VEC; ++v) slope[j][v] = value[j][v];
          }
          if (with_affine) affine(slope, scale, shift);
          multiply_by_slope(dx[y], slope, activation);
          if (with_sums) {
            float centre[VEC];
            affines.read(centre, 2, vector);
            columns.clear_others(dx[y]);
#pragma unroll
            for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                sums[0][v] = fmaf(dx[y][j][v], value[j][v] - centre[v], sums[0][v]);
                sums[1][v] += dx[y][j][v];
              }
            }
          }
          if (p.dx == nullptr) continue;
          if (p.prologue.scale.data != nullptr) {
#pragma unroll
            for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
              for (int v = 0; v < VEC; ++v) dx[y][j][v] *= scale[v];
            }
          }
          XRow::round(dx[y]).store(static_cast<T*>(p.dx) + place, s.c_in, columns);
        }
      }
      at += STRIDE * x_row_length;
    }
  }

  float* partial = p.partials + static_cast<int64_t>(blockIdx.x) * (kTaps + kMostGradientSums) * s.c_mid;
#pragma unroll
  for (int r = 0; r < K; ++r) {
    float filter_row[K][VEC];
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) filter_row[k][v] = dw[r * K + k][v];
    }
    reduce_over_strips<VEC>(filter_row, scratch, partial + static_cast<int64_t>(r) * K * s.c_mid, s.c_mid, first,
                            s.c_in, vectors, strips, active, vector, strip);
  }
  if (with_sums) {
    reduce_over_strips<VEC>(sums, scratch, partial + static_cast<int64_t>(kTaps) * s.c_mid, s.c_mid, first, s.c_in,
                            vectors, strips, active, vector, strip);
  }
}

template <class T>
void launch_depthwise_bprop(const DepthwiseBpropParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers), static_cast<unsigned>(p.plan.slices)),
                          kDepthwiseThreads, p.plan.shared_bytes};
  void (*kernel)(DepthwiseBpropParams) = nullptr;
  switch (p.shape.r * 10 + p.shape.stride_h) {
    case 31:
      kernel = depthwise_bprop_kernel<T, 3, 1, bprop_vec(3)>;
      break;
    case 32:
      kernel = depthwise_bprop_kernel<T, 3, 2, bprop_vec(3)>;
      break;
    case 51:
      kernel = depthwise_bprop_kernel<T, 5, 1, bprop_vec(5)>;
      break;
    case 52:
      kernel = depthwise_bprop_kernel<T, 5, 2, bprop_vec(5)>;
      break;
    case 71:
      kernel = depthwise_bprop_kernel<T, 7, 1, bprop_vec(7)>;
      break;
    case 72:
      kernel = depthwise_bprop_kernel<T, 7, 2, bprop_vec(7)>;
      break;
    default:
      no_such_kernel("depthwise_bprop_kernel", p);
  }
  launch(kernel, "depthwise_bprop_kernel", shape, stream, p);
}

}  // namespace xsep::cuda
