// Fused separable forward: the choice of a kernel.
#include "fprop.h"

#include "../launch.cuh"
#include "kept_plan.h"
#include "multiply.cuh"

namespace xsep::cuda {

template <class Policy>
void launch_separable_fprop(const SeparableFpropParams& p, cudaStream_t stream);

void separable_fprop(const SeparableFpropParams& p, cudaStream_t stream) {
  if (!p.plan.fused) no_such_kernel("separable_fprop_kernel", p);
  switch (p.type) {
    case kFloat16:
      launch_separable_fprop<TensorCores16<__half>>(p, stream);
      break;
    case kBFloat16:
      launch_separable_fprop<TensorCores16<__nv_bfloat16>>(p, stream);
      break;
    case kFloat32:
      if (p.allow_tf32 != 0) {
        launch_separable_fprop<TensorCoresTf32>(p, stream);
      } else {
        launch_separable_fprop<Simt32>(p, stream);
      }
      break;
  }
}

SeparablePlan kept_separable_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                  const DeviceProperties& device) {
  return kept_plan<SeparablePlan, plan_separable_fprop>(shape, c_out, element_bytes, aligned, device);
}

}  // namespace xsep::cuda
