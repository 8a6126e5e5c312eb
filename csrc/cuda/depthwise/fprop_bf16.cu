#include "fprop.cuh"

namespace xsep::cuda {

template void launch_depthwise_fprop<__nv_bfloat16>(const DepthwiseFpropParams&, cudaStream_t);

}  // namespace xsep::cuda
