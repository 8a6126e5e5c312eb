// Depthwise backward, fast path: dx, dw_dw and the prologue's sums in one pass over x and dz.
//
// A thread walks down kStripWidth neighbouring columns of x, for one vector of channels, STRIDE rows a step. The dz
// values that its dx is made of are the ones its x meets in dw_dw, so both come from the same registers, through which
// the rows of dz slide: where registers allow it, each is loaded once, while the row before it is used. A strip starts
// where an even tap falls on its first pixel: which tap joins which x and dz is then known at compile time, for stride
// 2 too. The sums for dw_dw stay in registers over all of a CTA's tiles, are added over the CTA in a fixed order, and
// leave as one partial; a second kernel adds the partials.
#pragma once

#include "../gradient_epilogue.cuh"
#include "../launch.cuh"
#include "../row.cuh"
#include "params.h"
#include "strip.cuh"

namespace xsep::cuda {

// The rows of dz that reach the rows of x of one step. The newest comes in the place of the oldest, rather than that
// all the others move; where that is has to be known at compile time, so each place has code of its own.
template <class T, int K, int STRIDE, int VEC>
class DzRows {
 public:
  static constexpr int kRows = DzReach<K, STRIDE>::kBefore + 1, kWidth = DzReach<K, STRIDE>::kWidth;
  using Row = PixelRow<T, VEC, kWidth>;

  // Row i of the first step, whose last is the newest.
  __device__ __forceinline__ void begin(int i, const Row& row) { row.widen(row_[i]); }

  // A step: calls f(i, row i from the oldest on), and bring(row) for the newest before it is used.
  template <class Bring, class Function>
  __device__ __forceinline__ void add(Bring bring, Function f) {
    add_at<0>(bring, f);
    newest_ = newest_ + 1 == kRows ? 0 : newest_ + 1;
  }

 private:
  float row_[kRows][kWidth][VEC];
  int newest_ = kRows - 1;  // its place

  // The newest comes last: widened first it would be widened before the places part, and then moved to its own.
  template <int PLACE, class Bring, class Function>
  __device__ __forceinline__ void add_at(Bring bring, Function f) {
    if constexpr (PLACE + 1 < kRows) {
      if (newest_ != PLACE) return add_at<PLACE + 1>(bring, f);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i + 1 == kRows) bring(row_[PLACE]);
      f(i, row_[(PLACE + 1 + i) % kRows]);
    }
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
  constexpr bool kKeepsX = sizeof(T) == 2, kLoadsDzAhead = K < 7, kLoadsXAhead = kLoadsDzAhead && kKeepsX;
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

  const int vector = static_cast<int>(threadIdx.x) % vectors, c = first + vector * VEC;
  const int strip = static_cast<int>(threadIdx.x) / vectors;
  const bool active = strip < strips && c < s.c_in;
  const bool with_sums = in_chain || p.dscale != nullptr || p.dshift != nullptr;
  const bool with_affine = p.prologue.scale.data != nullptr || p.prologue.shift.data != nullptr;
  const ActivationChoice activation{p.prologue.activation, p.prologue.alpha};
  const bool plain_relu = activation.code == Activation::kRelu && !with_affine;
  // With nothing to add up, ReLU's slope clears values that are rounded already, two an instruction.
  constexpr bool kCanMask = kKeepsX;
  enum Way { kThroughX = 1, kPlainRelu = 2, kMasks = 4 };  // the first: more than dw_dw is wanted
  const int way = kept((p.dx != nullptr || with_sums ? kThroughX : 0) |
                       (!plain_relu ? 0 : (kCanMask && !with_sums ? kMasks : kPlainRelu)));
  const int64_t x_row_length = static_cast<int64_t>(s.w) * s.c_in, dz_row_length = static_cast<int64_t>(s.q) * s.c_mid;

  float dw[kTaps][VEC] = {};
  float sums[kMostGradientSums][VEC] = {};  // for the scale, for the shift; or the chain's
  const int tiles = s.n * p.plan.tiles_down * p.plan.tiles_across;
  for (int tile = static_cast<int>(blockIdx.x); active && tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int tile_q = tile % p.plan.tiles_across, rest = tile / p.plan.tiles_across;
    const int tile_p = rest % p.plan.tiles_down;
    const int picture = rest / p.plan.tiles_down;
    const int row = (tile_p * p.plan.strips_down + strip / p.plan.strips_across) * p.plan.strip_rows;
    const int column = (tile_q * p.plan.strips_across + strip % p.plan.strips_across) * kStripWidth;
    const int h0 = row - s.pad_top % STRIDE, w0 = column - s.pad_left % STRIDE;
    if (h0 >= s.h || w0 >= s.w) continue;
    const int p0 = row / STRIDE + s.pad_top / STRIDE - kBefore, q0 = column / STRIDE + s.pad_left / STRIDE - kBefore;
    const Columns<kStripWidth> columns{w0, s.w};
    const Columns<kWidth> dz_columns{q0, s.q};
    const T* dz = static_cast<const T*>(p.dz) + ((static_cast<int64_t>(picture) * s.p + p0) * s.q + q0) * s.c_mid + c;
    // The step's first pixel in x.
    const T* source = static_cast<const T*>(p.x) + ((static_cast<int64_t>(picture) * s.h + h0) * s.w + w0) * s.c_in + c;
    const int h_end = min(s.h, h0 + p.plan.strip_rows);
    const auto is_x_row = [&](int h) { return static_cast<unsigned>(h) < static_cast<unsigned>(h_end); };
    const auto is_dz_row = [&](int row) { return static_cast<unsigned>(row) < static_cast<unsigned>(s.p); };
    // The newest row of dz of the step that begins at x's row h: found from it, as no register is free for another.
    const auto newest_of = [&](int h) { return (h + s.pad_top) / STRIDE; };

    DzRows<T, K, STRIDE, VEC> window;
    XRow next_x[STRIDE];
    DzRow next_dz;
    if (kKeepsRows) {
#pragma unroll
      for (int i = 0; i < kBefore; ++i) {
        next_dz.load(dz, s.c_mid, dz_columns, is_dz_row(p0 + i));
        window.begin(i, next_dz);
        dz += dz_row_length;
      }
    }
    const auto load_xs = [&](const T* from, int h) {
#pragma unroll
      for (int y = 0; y < STRIDE; ++y) {
        next_x[y].load(from + y * x_row_length, s.c_in, columns, is_x_row(h + y));
      }
    };
    if (kLoadsDzAhead) next_dz.load(dz, s.c_mid, dz_columns, is_dz_row(p0 + kBefore));
    if (kLoadsXAhead) load_xs(source, h0);

#pragma unroll 1
    for (int h = h0; h < h_end; h += STRIDE) {
      if (kKeepsRows && !kLoadsDzAhead) next_dz.load(dz, s.c_mid, dz_columns, is_dz_row(newest_of(h)));
      if (!kLoadsXAhead) load_xs(source, h);
      float scale[VEC], shift[VEC];
      affines.read(scale, 0, vector);
      affines.read(shift, 1, vector);
      XRow raw[STRIDE];  // or, where it only masks, what ReLU makes of it
      float x[STRIDE][kStripWidth][VEC];
#pragma unroll
      for (int y = 0; y < STRIDE; ++y) {
        raw[y] = next_x[y];
        if ((way & kMasks) != 0) {
          raw[y].relu();
          raw[y].widen(x[y]);
          continue;
        }
        if ((way & kPlainRelu) != 0) {
          XRow activated = raw[y];
          activated.relu();
          activated.widen(x[y]);
          continue;
        }
        raw[y].widen(x[y]);
        if (!is_x_row(h + y)) continue;
        if (with_affine) affine(x[y], scale, shift);
        activate_groups(x[y], activation);
        if (with_affine) columns.clear_others(x[y]);
      }
      // Into the registers from which this step's have just been taken.
      if (kLoadsXAhead) load_xs(source + STRIDE * x_row_length, h + STRIDE);
      dz += dz_row_length;

      float dx[STRIDE][kStripWidth][VEC] = {};
      if (kKeepsRows) {
        window.add(
            [&](float (&dz_row)[kWidth][VEC]) {
              next_dz.widen(dz_row);
              const int next = h + STRIDE;
              if (kLoadsDzAhead) next_dz.load(dz, s.c_mid, dz_columns, next < h_end && newest_of(next) < s.p);
            },
            [&](int i, const float (&dz_row)[kWidth][VEC]) {
              add_dz_row<K, STRIDE>(dx, dw, x, dz_row, i, weights, vector);
            });
      } else {
#pragma unroll
        for (int i = 0; i <= kBefore; ++i) {
          // A branch keeps the loads of one row apart from the next: all rows at once would spill.
          if (!is_dz_row(newest_of(h) - kBefore + i)) continue;
          next_dz.load(dz + (i - 1) * dz_row_length, s.c_mid, dz_columns);
          float dz_row[kWidth][VEC];
          next_dz.widen(dz_row);
          add_dz_row<K, STRIDE>(dx, dw, x, dz_row, i, weights, vector);
        }
      }

      if ((way & kThroughX) != 0) {
#pragma unroll
        for (int y = 0; y < STRIDE; ++y) {
          if (!is_x_row(h + y)) continue;
          const T* const own = source + y * x_row_length;
          const int64_t place = own - static_cast<const T*>(p.x);
          if constexpr (kCanMask) {
            if ((way & kMasks) != 0) {
              XRow rounded = XRow::round(dx[y]);
              rounded.clear_where_zero(raw[y]);
              rounded.store(static_cast<T*>(p.dx) + place, s.c_in, columns);
              continue;
            }
          }
          if (!kKeepsX) raw[y].load(own, s.c_in, columns);
          // Half by half: all at once take more registers than are left.
          constexpr int kHalf = kStripWidth / 2;
#pragma unroll
          for (int j = 0; j < kStripWidth; j += kHalf) {
            const PixelPlace of_half{picture, h + y, kept(w0) + j, place + j * s.c_in};
            const Columns<kHalf> half{of_half.w, s.w};
            float d[kHalf][VEC], value[kHalf][VEC];
#pragma unroll
            for (int k = 0; k < kHalf; ++k) {
              raw[y].pixel[j + k].widen(value[k]);
#pragma unroll
              for (int v = 0; v < VEC; ++v) d[k][v] = dx[y][j + k][v];
            }
            if (in_chain) {
              finish_gradient<T>(d, sums, p.epilogue, {p.x, p.dx, s.h, s.w, s.c_in}, of_half, c, value, scale, shift,
                                 activation, [&](int k, float (&middle)[VEC]) { affines.read(middle, 2 + k, vector); });
              continue;
            }
            float slope[kHalf][VEC];
#pragma unroll
            for (int k = 0; k < kHalf; ++k) {
#pragma unroll
              for (int v = 0; v < VEC; ++v) slope[k][v] = value[k][v];
            }
            if (with_affine) affine(slope, scale, shift);
            multiply_by_slope(d, slope, activation);
            if (with_sums) {
              float centre[VEC];
              affines.read(centre, 2, vector);
              half.clear_others(d);
#pragma unroll
              for (int k = 0; k < kHalf; ++k) {
#pragma unroll
                for (int v = 0; v < VEC; ++v) {
                  sums[0][v] = fmaf(d[k][v], value[k][v] - centre[v], sums[0][v]);
                  sums[1][v] += d[k][v];
                }
              }
            }
            if (p.dx == nullptr) continue;
            if (p.prologue.scale.data != nullptr) {
#pragma unroll
              for (int k = 0; k < kHalf; ++k) {
#pragma unroll
                for (int v = 0; v < VEC; ++v) d[k][v] *= scale[v];
              }
            }
            PixelRow<T, VEC, kHalf>::round(d).store(static_cast<T*>(p.dx) + of_half.at, s.c_in, half);
          }
        }
      }
      source += STRIDE * x_row_length;
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
                            s.c_in, vectors, strips, vector, strip);
  }
  if (with_sums) {
    reduce_over_strips<VEC>(sums, scratch, partial + static_cast<int64_t>(kTaps) * s.c_mid, s.c_mid, first, s.c_in,
                            vectors, strips, vector, strip);
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
