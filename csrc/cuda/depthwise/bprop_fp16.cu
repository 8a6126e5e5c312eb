#include "bprop.cuh"

namespace xsep::cuda {

template void launch_depthwise_bprop<__half>(const DepthwiseBpropParams&, cudaStream_t);

}  // namespace xsep::cuda
