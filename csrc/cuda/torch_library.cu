// The depthwise operators of xsep/_C_cuda.so on PyTorch's stable ABI, and what the library says of itself.
// xsep/backends/cuda.py brings tensors into the layouts that these ops ask for, and asks none for an empty tensor.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "depthwise/operator.h"
#include "device_scope.h"
#include "tensor.h"

namespace xsep::cuda {
namespace {

Tensor cuda_depthwise_fprop(Tensor x, Tensor w_dw, OptionalTensor scale_p, OptionalTensor shift_p,
                            OptionalTensor scale_e, OptionalTensor shift_e, Ints geometry, Ints activations,
                            Doubles alphas) {
  DepthwiseFpropParams p{};
  p.shape = conv_shape(x, w_dw, geometry);
  return run_depthwise_fprop(p, x, w_dw, scale_p, shift_p, scale_e, shift_e, activations, alphas);
}

// x_pre is written: a slice of a whole batch's, perhaps.
Tensor cuda_depthwise_fprop_residual(Tensor x, Tensor w_dw, Tensor residual, OptionalTensor scale_p,
                                     OptionalTensor shift_p, OptionalTensor scale_e, OptionalTensor shift_e,
                                     Ints geometry, Ints activations, Doubles alphas, Tensor x_pre) {
  DepthwiseFpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  p.residual = nhwc(residual, x, "residual", s.n, s.c_in, s.h, s.w);
  nhwc(x_pre, x, "x_pre", s.n, s.c_in, s.h, s.w);
  p.x_pre = x_pre.mutable_data_ptr();
  return run_depthwise_fprop(p, x, w_dw, scale_p, shift_p, scale_e, shift_e, activations, alphas);
}

// A depthwise layer that ends in a raw output: (y, statistics [tiles, 3, C_mid], counts [tiles], x_pre), of the rounded
// y. The last three have no elements where there are no statistics or no residual.
std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_depthwise_fprop_chain(Tensor x, OptionalTensor residual, Tensor w_dw,
                                                                      OptionalTensor scale_p, OptionalTensor shift_p,
                                                                      OptionalTensor scale_e, OptionalTensor shift_e,
                                                                      Ints geometry, Ints activations, Doubles alphas,
                                                                      bool with_statistics) {
  DepthwiseFpropParams p{};
  const ConvShape& s = p.shape = conv_shape(x, w_dw, geometry);
  Tensor x_pre = residual.has_value() ? new_nhwc(x, s.n, s.c_in, s.h, s.w) : new_flat(x, {0}, x.scalar_type());
  if (residual.has_value()) {
    p.residual = nhwc(*residual, x, "residual", s.n, s.c_in, s.h, s.w);
    p.x_pre = x_pre.mutable_data_ptr();
  }
  Statistics found(x);
  Tensor y = run_depthwise_fprop(p, x, w_dw, scale_p, shift_p, scale_e, shift_e, activations, alphas,
                                 with_statistics ? &found : nullptr);
  return {y, found.partials, found.counts, x_pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw,
                                                                OptionalTensor scale_p, OptionalTensor shift_p,
                                                                OptionalTensor centre, Ints geometry,
                                                                int64_t activation, double alpha, Ints wanted) {
  return run_depthwise_bprop(dz, x, w_dw, scale_p, shift_p, centre, geometry, activation, alpha, wanted);
}

__global__ void probe_kernel() {}

// What CUDA says to running this library's code on the current device: a cudaError_t, 0 where it can.
int64_t cuda_probe() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  cudaGetLastError();
  return static_cast<int64_t>(code);
}

// The architectures this library holds code for: 800 is sm_80.
Ints cuda_architectures() { return {__CUDA_ARCH_LIST__}; }

// What the planner is given for a device: multiprocessors, bytes of shared memory that a CTA can have, and of L2.
Ints cuda_device_facts(int64_t device) {
  DeviceProperties found{};
  const cudaError_t code = query_device(static_cast<int>(device), found);
  STD_TORCH_CHECK(code == cudaSuccess, "CUDA device ", device, ": ", cudaGetErrorString(code));
  return {found.multiprocessors, found.shared_bytes_per_cta, found.l2_bytes};
}

}  // namespace
}  // namespace xsep::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(XSEP_NAMESPACE, m) {
  m.def(
      "cuda_depthwise_fprop(Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, Tensor? scale_e, Tensor? shift_e, "
      "int[] geometry, int[] activations, float[] alphas) -> Tensor");
  m.def(
      "cuda_depthwise_fprop_residual(Tensor x, Tensor w_dw, Tensor residual, Tensor? scale_p, Tensor? shift_p, "
      "Tensor? scale_e, Tensor? shift_e, int[] geometry, int[] activations, float[] alphas, Tensor(a!) x_pre) -> "
      "Tensor");
  m.def(
      "cuda_depthwise_fprop_chain(Tensor x, Tensor? residual, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, "
      "Tensor? scale_e, Tensor? shift_e, int[] geometry, int[] activations, float[] alphas, bool statistics) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_depthwise_bprop(Tensor dz, Tensor x, Tensor w_dw, Tensor? scale_p, Tensor? shift_p, Tensor? centre, "
      "int[] geometry, int activation, float alpha, int[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_probe() -> int");
  m.def("cuda_architectures() -> int[]");
  m.def("cuda_device_facts(int device) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, XSEP_DISPATCH_KEY, m) {
  m.impl("cuda_depthwise_fprop", TORCH_BOX(&xsep::cuda::cuda_depthwise_fprop));
  m.impl("cuda_depthwise_fprop_residual", TORCH_BOX(&xsep::cuda::cuda_depthwise_fprop_residual));
  m.impl("cuda_depthwise_fprop_chain", TORCH_BOX(&xsep::cuda::cuda_depthwise_fprop_chain));
  m.impl("cuda_depthwise_bprop", TORCH_BOX(&xsep::cuda::cuda_depthwise_bprop));
}

STABLE_TORCH_LIBRARY_IMPL(XSEP_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_probe", TORCH_BOX(&xsep::cuda::cuda_probe));
  m.impl("cuda_architectures", TORCH_BOX(&xsep::cuda::cuda_architectures));
  m.impl("cuda_device_facts", TORCH_BOX(&xsep::cuda::cuda_device_facts));
}
