#include "wgrad.cuh"

namespace xsep::cuda {

template void launch_separable_wgrad<__nv_bfloat16>(const SeparableWgradParams&, cudaStream_t);

}  // namespace xsep::cuda
