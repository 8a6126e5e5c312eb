#include "fprop.cuh"

namespace xsep::cuda {

template void launch_separable_fprop<TensorCoresTf32>(const SeparableFpropParams&, cudaStream_t);

}  // namespace xsep::cuda
