#include "fprop.cuh"

namespace xsep::cuda {

template void launch_separable_fprop<Simt32>(const SeparableFpropParams&, cudaStream_t);

}  // namespace xsep::cuda
