#include "bprop.cuh"

namespace xsep::cuda {

template void launch_depthwise_bprop<__nv_bfloat16>(const DepthwiseBpropParams&, cudaStream_t);

}  // namespace xsep::cuda
