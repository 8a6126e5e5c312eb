// A layer's backward in one pass: the choice of a kernel, and the second stage of dw_pw.
#include "fused_backward.h"

#include "../launch.cuh"

namespace xsep::cuda {

template <class T>
void launch_fused_backward(const FusedBackwardParams& p, cudaStream_t stream);

namespace {

constexpr int kSumThreads = 256;

// Adds the partials, one element a thread, in the order of the rows.
__global__ void __launch_bounds__(kSumThreads) sum_dw_pw_kernel(const __grid_constant__ FusedBackwardParams p) {
  const int count = p.gradient.shape.c * p.depthwise.shape.c_in;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const int rows = p.plan.workers * p.plan.shares;
  double total = 0.0;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    total += static_cast<double>(p.dw_pw_partials[static_cast<int64_t>(row) * count + i]);
  }
  p.dw_pw[i] = static_cast<float>(total);
}

}  // namespace

void fused_backward(const FusedBackwardParams& p, cudaStream_t stream) {
  if (!p.plan.fused || p.depthwise.type == kFloat32) no_such_kernel("fused_backward_kernel", p);
  if (p.depthwise.type == kFloat16) {
    launch_fused_backward<__half>(p, stream);
  } else {
    launch_fused_backward<__nv_bfloat16>(p, stream);
  }
  const int count = p.gradient.shape.c * p.depthwise.shape.c_in;
  const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div(count, kSumThreads))), kSumThreads, 0};
  launch(sum_dw_pw_kernel, "sum_dw_pw_kernel", shape, stream, p);
}

}  // namespace xsep::cuda
