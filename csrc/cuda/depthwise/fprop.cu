// Depthwise forward: the general kernels, and the choice of one.
#include "fprop.h"

#include "../channels.cuh"
#include "../launch.cuh"
#include "../walk.cuh"

namespace xsep::cuda {

template <class T>
void launch_depthwise_fprop(const DepthwiseFpropParams& p, cudaStream_t stream);
extern template void launch_depthwise_fprop<float>(const DepthwiseFpropParams&, cudaStream_t);
extern template void launch_depthwise_fprop<__half>(const DepthwiseFpropParams&, cudaStream_t);
extern template void launch_depthwise_fprop<__nv_bfloat16>(const DepthwiseFpropParams&, cudaStream_t);

namespace {

constexpr int kGeneralThreads = 256;

// x_pre = scale * x + shift + residual, element by element.
template <class T>
__global__ void __launch_bounds__(kGeneralThreads)
    residual_prologue_kernel(const __grid_constant__ DepthwiseFpropParams p) {
  const int64_t count = static_cast<int64_t>(p.shape.n) * p.shape.h * p.shape.w * p.shape.c_in;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  ElementWalk walk(first, step, p.shape.h, p.shape.w, p.shape.c_in);
  for (int64_t i = first; i < count; i += step, walk.advance()) {
    const int c = static_cast<int>(walk.channel);
    const float scale = channel_value<T>(p.prologue.scale, c, 1.0f),
                shift = channel_value<T>(p.prologue.shift, c, 0.0f);
    const float pre = fmaf(scale, to_float(static_cast<const T*>(p.x)[i]), shift);
    static_cast<T*>(p.x_pre)[i] = from_float<T>(pre + to_float(static_cast<const T*>(p.residual)[i]));
  }
}

// One thread, one element of y; neighbouring threads take neighbouring channels.
template <class T>
__global__ void __launch_bounds__(kGeneralThreads)
    depthwise_fprop_general_kernel(const __grid_constant__ DepthwiseFpropParams p) {
  const ConvShape& s = p.shape;
  const T* x = static_cast<const T*>(p.x);
  const T* w_dw = static_cast<const T*>(p.w_dw);
  const int multiplier = s.c_mid / s.c_in;
  const int64_t count = static_cast<int64_t>(s.n) * s.p * s.q * s.c_mid;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  ElementWalk walk(first, step, s.p, s.q, s.c_mid);
  for (int64_t i = first; i < count; i += step, walk.advance()) {
    const int64_t picture = walk.pixel.picture;
    const int row = static_cast<int>(walk.pixel.row), q = static_cast<int>(walk.pixel.column);
    const int c_mid = static_cast<int>(walk.channel), c = multiplier == 1 ? c_mid : c_mid / multiplier;
    const float scale = channel_value<T>(p.prologue.scale, c, 1.0f),
                shift = channel_value<T>(p.prologue.shift, c, 0.0f);
    float sum[1] = {0.0f};
    for (int r = 0; r < s.r; ++r) {
      const int h = row * s.stride_h - s.pad_top + r * s.dilation_h;
      if (h < 0 || h >= s.h) continue;
      for (int k = 0; k < s.s; ++k) {
        const int w = q * s.stride_w - s.pad_left + k * s.dilation_w;
        if (w < 0 || w >= s.w) continue;
        float tap[1] = {fmaf(scale, to_float(x[((picture * s.h + h) * s.w + w) * s.c_in + c]), shift)};
        activate(tap, {p.prologue.activation, p.prologue.alpha});
        sum[0] = fmaf(tap[0], to_float(w_dw[(static_cast<int64_t>(c_mid) * s.r + r) * s.s + k]), sum[0]);
      }
    }
    sum[0] =
        fmaf(channel_value<T>(p.epilogue.scale, c_mid, 1.0f), sum[0], channel_value<T>(p.epilogue.shift, c_mid, 0.0f));
    activate(sum, {p.epilogue.activation, p.epilogue.alpha});
    static_cast<T*>(p.y)[i] = from_float<T>(sum[0]);
  }
}

template <class T>
void run(const DepthwiseFpropParams& p, cudaStream_t stream) {
  if (p.plan.sliding_window) {
    launch_depthwise_fprop<T>(p, stream);
    return;
  }
  const LaunchShape shape{dim3(static_cast<unsigned>(p.plan.workers)), kGeneralThreads, 0};
  DepthwiseFpropParams rest = p;
  if (p.residual != nullptr) {
    launch(residual_prologue_kernel<T>, "residual_prologue_kernel", shape, stream, p);
    rest.x = p.x_pre;
    rest.prologue.scale = rest.prologue.shift = ChannelVector{nullptr, 0};
  }
  launch(depthwise_fprop_general_kernel<T>, "depthwise_fprop_general_kernel", shape, stream, rest);
}

}  // namespace

void depthwise_fprop(const DepthwiseFpropParams& p, cudaStream_t stream) {
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

}  // namespace xsep::cuda
