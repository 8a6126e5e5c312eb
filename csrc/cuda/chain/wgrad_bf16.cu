#include "wgrad.cuh"

namespace xsep::cuda {

template void launch_chain_wgrad<__nv_bfloat16>(const ChainWgradParams&, cudaStream_t);

}  // namespace xsep::cuda
