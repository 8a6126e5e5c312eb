#include "wgrad.cuh"

namespace xsep::cuda {

template void launch_separable_wgrad<__half>(const SeparableWgradParams&, cudaStream_t);

}  // namespace xsep::cuda
