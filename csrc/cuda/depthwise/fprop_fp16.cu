#include "fprop.cuh"

namespace xsep::cuda {

template void launch_depthwise_fprop<__half>(const DepthwiseFpropParams&, cudaStream_t);

}  // namespace xsep::cuda
