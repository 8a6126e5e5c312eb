// Depthwise backward: the general kernels, the second stage of the sums, and the choice of kernels.
#include "bprop.h"

#include "../channels.cuh"
#include "../gradient_epilogue.cuh"
#include "../launch.cuh"
#include "../walk.cuh"
#include "row_sums.cuh"

namespace xsep::cuda {

template <class T>
void launch_depthwise_bprop(const DepthwiseBpropParams& p, cudaStream_t stream);
extern template void launch_depthwise_bprop<float>(const DepthwiseBpropParams&, cudaStream_t);
extern template void launch_depthwise_bprop<__half>(const DepthwiseBpropParams&, cudaStream_t);
extern template void launch_depthwise_bprop<__nv_bfloat16>(const DepthwiseBpropParams&, cudaStream_t);

namespace {

constexpr int kGeneralThreads = 256;
constexpr int kLanes = 32;  // channels of a CTA that adds something up
constexpr int kShares = kGeneralThreads / kLanes;
static_assert(kShares >= kMostGradientSums, "each sum of a CTA has threads of its own");

template <class T>
struct Prologue {
  float scale, shift;
  ActivationChoice activation;

  __device__ Prologue(const ChannelAffine& affine, int c)
      : scale(channel_value<T>(affine.scale, c, 1.0f)),
        shift(channel_value<T>(affine.shift, c, 0.0f)),
        activation{affine.activation, affine.alpha} {}

  __device__ float operator()(float x) const {
    float u[1] = {fmaf(scale, x, shift)};
    activate(u, activation);
    return u[0];
  }
  __device__ float slope(float x) const {
    float u[1] = {fmaf(scale, x, shift)};
    activation_slope(u, activation);
    return u[0];
  }
};

// Whether an output of the stride starts there, and which. Most strides are 1, where nothing has to be divided.
__device__ __forceinline__ bool output_at(int place, int stride, int outputs, int& output) {
  output = place;
  if (place < 0) return false;
  if (stride != 1) {
    output = place / stride;
    if (output * stride != place) return false;
  }
  return output < outputs;
}

// The gradient of act(scale * x + shift) at one element of x: gathered from the outputs that read it.
template <class T>
__device__ float gather_gradient(const DepthwiseBpropParams& p, int64_t picture, int h, int w, int c) {
  const ConvShape& s = p.shape;
  const int multiplier = s.c_mid == s.c_in ? 1 : s.c_mid / s.c_in;
  float sum = 0.0f;
  for (int r = 0; r < s.r; ++r) {
    int row, column;
    if (!output_at(h + s.pad_top - r * s.dilation_h, s.stride_h, s.p, row)) continue;
    for (int k = 0; k < s.s; ++k) {
      if (!output_at(w + s.pad_left - k * s.dilation_w, s.stride_w, s.q, column)) continue;
      const int64_t pixel = (picture * s.p + row) * s.q + column;
      for (int m = 0; m < multiplier; ++m) {
        const int64_t c_mid = static_cast<int64_t>(c) * multiplier + m;
        const float weight = to_float(static_cast<const T*>(p.w_dw)[(c_mid * s.r + r) * s.s + k]);
        sum = fmaf(to_float(static_cast<const T*>(p.dz)[pixel * s.c_mid + c_mid]), weight, sum);
      }
    }
  }
  return sum;
}

// dx at one element from e, the gradient of act(u), as the training chain wants it; and its sums.
template <class T>
__device__ __forceinline__ float chain_gradient(const DepthwiseBpropParams& p, float e, const Prologue<T>& prologue,
                                                float x, const PixelPlace& place, int c,
                                                float (&sums)[kMostGradientSums]) {
  const ConvShape& s = p.shape;
  const bool joins = p.epilogue.shortcut != nullptr, before = p.epilogue.before_mask != 0;
  float d[1][1] = {{e}};
  if (joins && before) add_shortcut<T>(d, p.epilogue, place, s.h, s.w, s.c_in, c);
  d[0][0] *= prologue.slope(x);
  if (joins && !before) add_shortcut<T>(d, p.epilogue, place, s.h, s.w, s.c_in, c);
  round_to<T>(d[0]);
  float total[kMostGradientSums][1] = {};
  const float pixel[1][1] = {{x}};
  add_to_sums<T>(total, d, p.epilogue, p.x, pixel, place.at, s.c_in, {place.w, s.w}, [&](int k, float (&centre)[1]) {
    centre[0] = p.epilogue.centres[static_cast<int64_t>(k + 1) * s.c_in + c];
  });
#pragma unroll
  for (int k = 0; k < kMostGradientSums; ++k) sums[k] += total[k][0];
  return d[0][0];
}

// Whether anybody wants what the general dgrad adds up of dx.
__host__ __device__ __forceinline__ bool has_sums(const DepthwiseBpropParams& p) {
  return p.epilogue.sums > 0 || p.dscale != nullptr || p.dshift != nullptr;
}

// dx and this CTA's share of the sums. A CTA has 32 channels; its threads take pixels in turn.
template <class T>
__global__ void __launch_bounds__(kGeneralThreads, 3)
    depthwise_dgrad_general_kernel(const __grid_constant__ DepthwiseBpropParams p) {
  const ConvShape& s = p.shape;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, share = static_cast<int>(threadIdx.x) / kLanes;
  const int c = static_cast<int>(blockIdx.y) * kLanes + lane;
  float sums[kMostGradientSums] = {};
  if (c < s.c_in) {
    const Prologue<T> prologue(p.prologue, c);
    const float centre = p.centre == nullptr ? 0.0f : p.centre[c];
    const int64_t pixels = static_cast<int64_t>(s.n) * s.h * s.w;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kShares;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kShares + share;
    PixelWalk walk(first, step, s.h, s.w);
    for (int64_t i = first; i < pixels; i += step, walk.advance()) {
      const int w = static_cast<int>(walk.column), h = static_cast<int>(walk.row);
      const int64_t picture = walk.picture, at = i * s.c_in + c;
      const float x = to_float(static_cast<const T*>(p.x)[at]);
      const float e = gather_gradient<T>(p, picture, h, w, c);
      float dx;
      if (p.epilogue.sums > 0) {
        dx = chain_gradient<T>(p, e, prologue, x, {picture, h, w, at}, c, sums);
      } else {
        const float du = e * prologue.slope(x);
        sums[0] = fmaf(du, x - centre, sums[0]);
        sums[1] += du;
        dx = du * prologue.scale;
      }
      if (p.dx != nullptr) static_cast<T*>(p.dx)[at] = from_float<T>(dx);
    }
  }
  if (!has_sums(p)) return;  // nor rows of partials for so many CTAs
  SharedArena arena;
  const SharedBuffer<float> scratch = arena.take<float>(kMostGradientSums * kGeneralThreads);
  for (int i = 0; i < kMostGradientSums; ++i) scratch[i * kGeneralThreads + static_cast<int>(threadIdx.x)] = sums[i];
  __syncthreads();
  if (share >= kMostGradientSums || c >= s.c_in) return;
  float total = 0.0f;
  for (int i = 0; i < kShares; ++i) total += scratch[share * kGeneralThreads + i * kLanes + lane];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (s.r * s.s + kMostGradientSums) + s.r * s.s + share;
  p.partials[row * s.c_mid + c] = total;
}

// One tap of dw_dw, 32 channels, a share of the pixels.
template <class T>
__global__ void __launch_bounds__(kGeneralThreads)
    depthwise_wgrad_general_kernel(const __grid_constant__ DepthwiseBpropParams p) {
  const ConvShape& s = p.shape;
  const int taps = s.r * s.s;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, share = static_cast<int>(threadIdx.x) / kLanes;
  const int c_mid = static_cast<int>(blockIdx.y) * kLanes + lane;
  const int worker = static_cast<int>(blockIdx.x) / taps, tap = static_cast<int>(blockIdx.x) % taps;
  const int r = tap / s.s, k = tap % s.s;
  float sum = 0.0f;
  if (c_mid < s.c_mid) {
    const int c = c_mid / (s.c_mid / s.c_in);
    const Prologue<T> prologue(p.prologue, c);
    const int64_t pixels = static_cast<int64_t>(s.n) * s.p * s.q;
    const int64_t step = static_cast<int64_t>(p.plan.workers) * kShares;
    const int64_t first = static_cast<int64_t>(worker) * kShares + share;
    PixelWalk walk(first, step, s.p, s.q);
    for (int64_t i = first; i < pixels; i += step, walk.advance()) {
      const int h = static_cast<int>(walk.row) * s.stride_h - s.pad_top + r * s.dilation_h;
      const int w = static_cast<int>(walk.column) * s.stride_w - s.pad_left + k * s.dilation_w;
      if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
      const int64_t pixel = (walk.picture * s.h + h) * s.w + w;
      const float x = prologue(to_float(static_cast<const T*>(p.x)[pixel * s.c_in + c]));
      sum = fmaf(x, to_float(static_cast<const T*>(p.dz)[i * s.c_mid + c_mid]), sum);
    }
  }
  SharedArena arena;
  const SharedBuffer<float> scratch = arena.take<float>(kGeneralThreads);
  scratch[static_cast<int>(threadIdx.x)] = sum;
  __syncthreads();
  if (share != 0 || c_mid >= s.c_mid) return;
  float total = 0.0f;
  for (int i = 0; i < kShares; ++i) total += scratch[i * kLanes + lane];
  p.partials[(static_cast<int64_t>(worker) * (taps + kMostGradientSums) + tap) * s.c_mid + c_mid] = total;
}

// The second stage.
template <class T>
__global__ void __launch_bounds__(kSumThreads) sum_bprop_partials_kernel(const __grid_constant__ SumPartialsParams p) {
  const ConvShape& s = p.shape;
  const int taps = s.r * s.s, entries = taps + kMostGradientSums;
  const int64_t columns = static_cast<int64_t>(entries) * s.c_mid, column = column_of_thread();
  const int entry = static_cast<int>(column / s.c_mid);
  const int64_t c = column % s.c_mid;
  float* vector = entry >= taps && entry < entries && c < s.c_in ? p.vectors[entry - taps] : nullptr;
  const bool wanted = entry < taps ? p.dw_dw != nullptr : vector != nullptr;
  sum_rows(p.partials, p.rows, columns, wanted, [&](float total) {
    if (entry < taps) {
      static_cast<T*>(p.dw_dw)[c * taps + entry] = from_float<T>(total);
    } else {
      vector[c] = total;
    }
  });
}

template <class T>
void run(const DepthwiseBpropParams& p, cudaStream_t stream) {
  const ConvShape& s = p.shape;
  const auto grid = [](int x, int y) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); };
  if (p.plan.sliding_window) {
    launch_depthwise_bprop<T>(p, stream);
    return;
  }
  constexpr int kBytes = kGeneralThreads * static_cast<int>(sizeof(float));
  if (p.dx != nullptr || p.dscale != nullptr || p.dshift != nullptr) {
    const int workers = has_sums(p) ? p.plan.workers : p.plan.dgrad_workers;
    const LaunchShape shape{grid(workers, ceil_div(s.c_in, kLanes)), kGeneralThreads, kMostGradientSums * kBytes};
    launch(depthwise_dgrad_general_kernel<T>, "depthwise_dgrad_general_kernel", shape, stream, p);
  }
  if (p.dw_dw != nullptr || p.epilogue.sums > 0) {
    const LaunchShape shape{grid(p.plan.workers * s.r * s.s, ceil_div(s.c_mid, kLanes)), kGeneralThreads, kBytes};
    launch(depthwise_wgrad_general_kernel<T>, "depthwise_wgrad_general_kernel", shape, stream, p);
  }
}

template <class T>
void run_sums(const SumPartialsParams& p, cudaStream_t stream) {
  const int64_t columns = static_cast<int64_t>(bprop_partial_rows(p.shape)) * p.shape.c_mid;
  launch(sum_bprop_partials_kernel<T>, "sum_bprop_partials_kernel", row_sums_launch(columns), stream, p);
}

}  // namespace

void depthwise_bprop_partials(const DepthwiseBpropParams& p, cudaStream_t stream) {
  switch (p.type) {
    case kFloat32:
      run<float>(p, stream);
      break;
    case kFloat16:
      run<__half>(p, stream);
      break;
    case kBFloat16:
      run<__nv_bfloat16>(p, stream);
      break;
  }
}

void sum_bprop_partials(const SumPartialsParams& p, cudaStream_t stream) {
  switch (p.type) {
    case kFloat32:
      run_sums<float>(p, stream);
      break;
    case kFloat16:
      run_sums<__half>(p, stream);
      break;
    case kBFloat16:
      run_sums<__nv_bfloat16>(p, stream);
      break;
  }
}

void depthwise_bprop(const DepthwiseBpropParams& p, cudaStream_t stream) {
  depthwise_bprop_partials(p, stream);
  if (p.dw_dw == nullptr && p.dscale == nullptr && p.dshift == nullptr) return;
  sum_bprop_partials({p.shape, p.type, p.plan.workers, p.partials, p.dw_dw, {p.dscale, p.dshift, nullptr}}, stream);
}

}  // namespace xsep::cuda
