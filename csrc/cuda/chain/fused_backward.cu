// A layer's backward in one pass: the choice of a kernel.
#include "fused_backward.h"

#include "../launch.cuh"
#include "../separable/wgrad_sums.h"

namespace xsep::cuda {

template <class T>
void launch_fused_backward(const FusedBackwardParams& p, cudaStream_t stream);

void fused_backward(const FusedBackwardParams& p, cudaStream_t stream) {
  if (!p.plan.fused || p.depthwise.type == kFloat32) no_such_kernel("fused_backward_kernel", p);
  if (p.depthwise.type == kFloat16) {
    launch_fused_backward<__half>(p, stream);
  } else {
    launch_fused_backward<__nv_bfloat16>(p, stream);
  }
  sum_dw_pw({p.gradient.shape.c, p.depthwise.shape.c_in, p.plan.workers * p.plan.shares, p.dw_pw_partials, p.dw_pw},
            stream);
}

}  // namespace xsep::cuda
