// Depthwise forward, fast path: square filters of 3, 5 or 7, stride 1 or 2, whole vectors of channels.
//
// A thread walks down kStripWidth neighbouring columns of y, for one vector of channels. It loads each row of x under
// them once, the next row while it multiplies this one, and adds what the row is to each row of y that it reaches:
// those slide through registers, begun at the filter's first row and stored after its last. What neighbours share is
// found in L1. A CTA keeps one slice of the channels, whose weights it holds in shared memory, and goes from tile to
// tile.
#pragma once

#include "../channels.cuh"
#include "../launch.cuh"
#include "../row.cuh"
#include "params.h"
#include "statistics.cuh"

namespace xsep::cuda {

// act(scale x + shift [+ residual]) of the pixels that are there, the others zero. residual: of the first, or null.
template <class T, int VEC, int WIDTH, class Table>
__device__ __forceinline__ void apply_prologue(float (&tap)[WIDTH][VEC], const DepthwiseFpropParams& p,
                                               const Table& affines, int vector, const T* residual,
                                               const Columns<WIDTH>& columns) {
  if (p.prologue.scale.data != nullptr || p.prologue.shift.data != nullptr) {
    float scale[VEC], shift[VEC];
    affines.read(scale, 0, vector);
    affines.read(shift, 1, vector);
    affine(tap, scale, shift);
  }
  if (residual != nullptr) {
    PixelRow<T, VEC, WIDTH> row;
    row.load(residual, p.shape.c_in, columns);
    float other[WIDTH][VEC];
    row.widen(other);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) tap[i][v] += other[i][v];
      round_to<T>(tap[i]);  // what backward will find in x_pre
    }
  }
  activate_groups(tap, {p.prologue.activation, p.prologue.alpha});
  columns.clear_others(tap);
}

template <int VEC, class Table>
__device__ __forceinline__ void apply_epilogue(float (&sum)[kStripWidth][VEC], const DepthwiseFpropParams& p,
                                               const Table& affines, int vector) {
  float scale[VEC], shift[VEC];
  affines.read(scale, 2, vector);
  affines.read(shift, 3, vector);
  affine(sum, scale, shift);
  activate_groups(sum, {p.epilogue.activation, p.epilogue.alpha});
}

// Adds what row r of the filter makes of a row of x.
template <int K, int STRIDE, int VEC, int WIDTH, class Table>
__device__ __forceinline__ void add_row(float (&sum)[kStripWidth][VEC], const float (&tap)[WIDTH][VEC],
                                        const Table& weights, int r, int vector) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float weight[VEC];
    weights.read(weight, r * K + k, vector);
#pragma unroll
    for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) sum[j][v] = fmaf(tap[j * STRIDE + k][v], weight[v], sum[j][v]);
    }
  }
}

// Writes one row of x_pre, x's row h, of the columns [left, right): every pixel belongs to exactly one strip.
template <class T, int VEC>
__device__ __forceinline__ void store_x_pre(const DepthwiseFpropParams& p, int64_t picture, int h, int left, int right,
                                            int c, const float (&scale)[VEC], const float (&shift)[VEC]) {
  const ConvShape& s = p.shape;
#pragma unroll 1
  for (int w = left; w < right; ++w) {
    const int64_t at = ((picture * s.h + h) * s.w + w) * s.c_in + c;
    float pre[VEC], other[VEC];
    read_pixel<T>(pre, p.x, at);
    read_pixel<T>(other, p.residual, at);
#pragma unroll
    for (int v = 0; v < VEC; ++v) pre[v] = fmaf(scale[v], pre[v], shift[v]) + other[v];
    write_pixel<T>(p.x_pre, at, pre);
  }
}

// Of `count` rows or columns of y from `first` on, where x's that belong to them begin and end: all of x belongs to
// somebody, and so does what no tap reaches.
struct OwnRange {
  int begin, end;

  __device__ OwnRange(int first, int count, int outputs, int stride, int pad, int size)
      : begin(first == 0 ? 0 : min(max(first * stride - pad, 0), size)),
        end(first + count >= outputs ? size : min(max((first + count) * stride - pad, 0), size)) {}
};

template <class T, int K, int STRIDE>
__global__ void __launch_bounds__(kDepthwiseThreads, fprop_ctas_per_sm(K, STRIDE, static_cast<int>(sizeof(T))))
    depthwise_fprop_kernel(const __grid_constant__ DepthwiseFpropParams p) {
  constexpr int kVec = kFpropVec, kTaps = K * K;
  constexpr int kWidth = (kStripWidth - 1) * STRIDE + K;
  constexpr int kOpen = (K - 1) / STRIDE;  // rows of y that lie open between two steps
  static_assert((K - 1) % STRIDE == 0, "a step's first row of x finishes a row of y");
  constexpr bool kLoadsAhead = K < 7 || sizeof(T) == 2;  // else no registers are left for a second row of x
  using Table = ChannelTable<kVec, kFpropVectors>;
  using Row = PixelRow<T, kVec, kWidth>;

  const ConvShape& s = p.shape;
  const int vectors = p.plan.vectors;
  SharedArena arena;
  const Table weights(arena.take<float>(Table::size(kTaps, kFpropVectors)));
  const Table affines(arena.take<float>(Table::size(4, kFpropVectors)));
  const int first = static_cast<int>(blockIdx.y) * vectors * kVec;
  load_weights<T>(weights, p.w_dw, kTaps, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 0, p.prologue.scale, 1.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 1, p.prologue.shift, 0.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 2, p.epilogue.scale, 1.0f, first, s.c_in, vectors);
  load_channel_vector<T>(affines, 3, p.epilogue.shift, 0.0f, first, s.c_in, vectors);
  const FpropStatistics<T, kVec> statistics(p, arena);
  __syncthreads();

  const int vector = static_cast<int>(threadIdx.x) % vectors, strip = static_cast<int>(threadIdx.x) / vectors;
  const int c = first + vector * kVec;
  const bool idle = strip >= p.plan.strips_down * p.plan.strips_across || c >= s.c_in;
  const bool plain_relu = p.prologue.activation == Activation::kRelu && p.prologue.scale.data == nullptr &&
                          p.prologue.shift.data == nullptr && p.residual == nullptr;
  const bool with_prologue = !plain_relu && (!p.prologue.is_identity() || p.residual != nullptr);
  enum Way { kPlainRelu = 1, kPrologue = 2, kEpilogue = 4, kStoresXPre = 8 };
  const int way = kept((plain_relu ? kPlainRelu : 0) | (with_prologue ? kPrologue : 0) |
                       (!p.epilogue.is_identity() ? kEpilogue : 0) | (p.x_pre != nullptr ? kStoresXPre : 0));
  const int64_t row_length = static_cast<int64_t>(s.w) * s.c_in;

  const int tiles = s.n * p.plan.tiles_down * p.plan.tiles_across;
  for (int tile = idle ? tiles : static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    const int tile_q = tile % p.plan.tiles_across, rest = tile / p.plan.tiles_across;
    const int tile_p = rest % p.plan.tiles_down;
    const int64_t picture = rest / p.plan.tiles_down;
    const int p0 = (tile_p * p.plan.strips_down + strip / p.plan.strips_across) * p.plan.strip_rows;
    const int q0 = (tile_q * p.plan.strips_across + strip % p.plan.strips_across) * kStripWidth;
    if (p0 >= s.p || q0 >= s.q) continue;
    const int rows = min(p.plan.strip_rows, s.p - p0);
    const int h0 = p0 * STRIDE - s.pad_top, w0 = q0 * STRIDE - s.pad_left;
    const int h_last = h0 + (rows - 1) * STRIDE + K, h_end = min(s.h, h_last);
    const Columns<kWidth> columns{w0, s.w};
    const T* source = static_cast<const T*>(p.x) + ((picture * s.h + h0) * s.w + w0) * s.c_in + c;  // of row h below
    const auto is_row = [&](int h) { return static_cast<unsigned>(h) < static_cast<unsigned>(h_end); };

    T* out = static_cast<T*>(p.y) + ((picture * s.p + p0) * s.q + q0) * s.c_mid + c;
    const auto store_own_rows = [&](int from, int to) {  // those of x that are among so many
      const OwnRange across(q0, kStripWidth, s.q, STRIDE, s.pad_left, s.w);
      const OwnRange down(p0, rows, s.p, STRIDE, s.pad_top, s.h);
      float scale[kVec], shift[kVec];
      affines.read(scale, 0, vector);
      affines.read(shift, 1, vector);
#pragma unroll 1
      for (int h = max(from, down.begin); h < min(to, down.end); ++h) {
        store_x_pre<T>(p, picture, h, across.begin, across.end, c, scale, shift);
      }
    };

    Row next;
    if (kLoadsAhead) next.load(source, s.c_in, columns, is_row(h0));
    // Of rows of y, the one begun last first. Those above the strip are added up too, from whatever is there, and those
    // below it: it takes less than to ask, and they are not stored.
    float open[kOpen][kStripWidth][kVec] = {};
    const auto move = [](float (&to)[kStripWidth][kVec], const float (&from)[kStripWidth][kVec]) {
#pragma unroll
      for (int j = 0; j < kStripWidth; ++j) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) to[j][v] = from[j][v];
      }
    };
    int h = h0;
#pragma unroll 1
    for (; h < h_last; h += STRIDE) {
#pragma unroll
      for (int phase = 0; phase < STRIDE; ++phase) {
        if (phase > 0 && h + phase >= h_last) break;
        const T* const row = source + phase * row_length;
        float tap[kWidth][kVec];
        if (!kLoadsAhead) next.load(row, s.c_in, columns, is_row(h + phase));
        if ((way & kPlainRelu) != 0) {
          Row activated = next;
          activated.relu();
          activated.widen(tap);
        } else {
          next.widen(tap);
        }
        if (kLoadsAhead) next.load(row + row_length, s.c_in, columns, is_row(h + phase + 1));
        if ((way & kPrologue) != 0 && is_row(h + phase)) {
          const int64_t place = row - static_cast<const T*>(p.x);
          const T* const residual = p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + place;
          apply_prologue<T>(tap, p, affines, vector, residual, columns);
        }
        if (phase == 0) {
          // The oldest is finished, the others age, each in the next one's place while this row is added to it, and one
          // is begun.
          float finished[kStripWidth][kVec];
          move(finished, open[kOpen - 1]);
          add_row<K, STRIDE>(finished, tap, weights, K - 1, vector);
          if (h >= h0 + kOpen * STRIDE) {
            if ((way & kEpilogue) != 0) apply_epilogue(finished, p, affines, vector);
            PixelRow<T, kVec, kStripWidth>::round(finished).store(out, s.c_mid, {q0, s.q});
            out += static_cast<int64_t>(s.q) * s.c_mid;
            statistics.add(finished, s.q - q0);
          }
#pragma unroll
          for (int age = kOpen - 1; age > 0; --age) move(open[age], open[age - 1]);
          move(open[0], {});
        }
#pragma unroll
        for (int age = kOpen - 1; age >= 0; --age) {
          add_row<K, STRIDE>(open[age], tap, weights, age * STRIDE + phase, vector);
        }
      }
      source += STRIDE * row_length;
      if ((way & kStoresXPre) != 0) store_own_rows(h, h + STRIDE);
    }
    if ((way & kStoresXPre) != 0) store_own_rows(h, s.h);  // that no tap reaches
  }
  statistics.store();
}

template <class T>
void launch_depthwise_fprop(const DepthwiseFpropParams& p, cudaStream_t stream) {
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers), static_cast<unsigned>(p.plan.slices)),
                          kDepthwiseThreads,
                          p.plan.shared_bytes + (p.statistics == nullptr ? 0 : fprop_statistics_bytes(p.plan))};
  void (*kernel)(DepthwiseFpropParams) = nullptr;
  switch (p.shape.r * 10 + p.shape.stride_h) {
    case 31:
      kernel = depthwise_fprop_kernel<T, 3, 1>;
      break;
    case 32:
      kernel = depthwise_fprop_kernel<T, 3, 2>;
      break;
    case 51:
      kernel = depthwise_fprop_kernel<T, 5, 1>;
      break;
    case 52:
      kernel = depthwise_fprop_kernel<T, 5, 2>;
      break;
    case 71:
      kernel = depthwise_fprop_kernel<T, 7, 1>;
      break;
    case 72:
      kernel = depthwise_fprop_kernel<T, 7, 2>;
      break;
    default:
      no_such_kernel("depthwise_fprop_kernel", p);
  }
  launch(kernel, "depthwise_fprop_kernel", shape, stream, p);
}

}  // namespace xsep::cuda
