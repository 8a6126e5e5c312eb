// The gradient of the pointwise weights: the choice of a kernel.
#include "wgrad.h"

#include "../launch.cuh"
#include "kept_plan.h"

namespace xsep::cuda {

template <class T>
void launch_separable_wgrad(const SeparableWgradParams& p, cudaStream_t stream);
extern template void launch_separable_wgrad<__half>(const SeparableWgradParams&, cudaStream_t);
extern template void launch_separable_wgrad<__nv_bfloat16>(const SeparableWgradParams&, cudaStream_t);

void separable_wgrad(const SeparableWgradParams& p, cudaStream_t stream) {
  const SeparableFpropParams& layer = p.layer;
  if (!layer.plan.fused || layer.type == kFloat32) no_such_kernel("separable_wgrad_kernel", p);
  if (layer.type == kFloat16) {
    launch_separable_wgrad<__half>(p, stream);
  } else {
    launch_separable_wgrad<__nv_bfloat16>(p, stream);
  }
  sum_dw_pw(sums_of(p), stream);
}

SeparableWgradPlan kept_wgrad_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                   const DeviceProperties& device) {
  return kept_plan<SeparableWgradPlan, plan_separable_wgrad>(shape, c_out, element_bytes, aligned, device);
}

}  // namespace xsep::cuda
