#include "fused_backward.cuh"

namespace xsep::cuda {

template void launch_fused_backward<__nv_bfloat16>(const FusedBackwardParams&, cudaStream_t);

}  // namespace xsep::cuda
