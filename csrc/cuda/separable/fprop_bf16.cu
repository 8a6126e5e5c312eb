#include "fprop.cuh"

namespace xsep::cuda {

template void launch_separable_fprop<TensorCores16<__nv_bfloat16>>(const SeparableFpropParams&, cudaStream_t);

}  // namespace xsep::cuda
