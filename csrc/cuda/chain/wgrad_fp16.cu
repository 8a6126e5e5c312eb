#include "wgrad.cuh"

namespace xsep::cuda {

template void launch_chain_wgrad<__half>(const ChainWgradParams&, cudaStream_t);

}  // namespace xsep::cuda
