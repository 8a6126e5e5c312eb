// Whose tensors the operators take, and where they are registered: a GPU's, among all of xsep's. Built for the tests'
// emulator they take a CPU's and lie in a namespace of their own, so that one process can hold both libraries.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"

namespace xsep::cuda {

#ifdef XSEP_EMULATOR
#define XSEP_DISPATCH_KEY CompositeExplicitAutograd  // whatever the tensors' device, so that the checks see wrong ones
inline bool is_on_gpu(const torch::stable::Tensor& t) { return t.is_cpu(); }
inline int device_index(const torch::stable::Tensor&) { return emulator::device(); }
#else
#define XSEP_NAMESPACE xsep
#define XSEP_DISPATCH_KEY CUDA
inline bool is_on_gpu(const torch::stable::Tensor& t) { return t.is_cuda(); }
inline int device_index(const torch::stable::Tensor& t) { return t.get_device_index(); }
#endif

}  // namespace xsep::cuda
