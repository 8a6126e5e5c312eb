// The pointwise weights' gradient in the training chain: the choice of a kernel.
#include "wgrad.h"

#include "../launch.cuh"
#include "../separable/kept_plan.h"
#include "../separable/wgrad_sums.h"

namespace xsep::cuda {

template <class T>
void launch_chain_wgrad(const ChainWgradParams& p, cudaStream_t stream);
extern template void launch_chain_wgrad<__half>(const ChainWgradParams&, cudaStream_t);
extern template void launch_chain_wgrad<__nv_bfloat16>(const ChainWgradParams&, cudaStream_t);

void chain_wgrad(const ChainWgradParams& p, cudaStream_t stream) {
  const SeparableFpropParams& layer = p.wgrad.layer;
  if (!layer.plan.fused || layer.type == kFloat32) no_such_kernel("chain_wgrad_kernel", p);
  if (layer.type == kFloat16) {
    launch_chain_wgrad<__half>(p, stream);
  } else {
    launch_chain_wgrad<__nv_bfloat16>(p, stream);
  }
  sum_dw_pw(sums_of(p.wgrad), stream);
}

SeparableWgradPlan kept_chain_wgrad_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                         const DeviceProperties& device) {
  return kept_plan<SeparableWgradPlan, plan_chain_wgrad>(shape, c_out, element_bytes, aligned, device);
}

}  // namespace xsep::cuda
