// A layer's backward in one pass: the choice of a kernel, and the second stage of dw_pw.
#include "fused_backward.h"

#include "../depthwise/row_sums.cuh"

namespace xsep::cuda {

template <class T>
void launch_fused_backward(const FusedBackwardParams& p, cudaStream_t stream);

namespace {

// Of dw_pw, each CTA and share of its warps has left a partial.
__global__ void __launch_bounds__(kSumThreads) sum_dw_pw_kernel(const __grid_constant__ FusedBackwardParams p) {
  const int count = p.gradient.shape.c * p.depthwise.shape.c_in;
  const int64_t i = column_of_thread();
  sum_rows(p.dw_pw_partials, p.plan.workers * p.plan.shares, count, i < count,
           [&](float total) { p.dw_pw[i] = total; });
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
  launch(sum_dw_pw_kernel, "sum_dw_pw_kernel", row_sums_launch(count), stream, p);
}

}  // namespace xsep::cuda
