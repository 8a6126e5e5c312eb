#pragma once

#include "../device.cuh"
#include "params.h"

namespace xsep::cuda {

// The mean of relu(scale r + shift) over each picture, pixels above zero, and the sum of r over them. Throws
// std::runtime_error where CUDA refuses.
void relu_average(const AverageParams& p, cudaStream_t stream);

// Its gradient with respect to u, and the sums of that from what forward left: no second look at the pixels.
void relu_average_backward(const AverageBackwardParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
