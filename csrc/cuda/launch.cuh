// The one way kernels are launched.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "params.h"

namespace xsep::cuda {

// Throws std::runtime_error with the kernel's name, the whole problem and CUDA's words where code is an error. A
// problem is a params struct, or whatever else describe() has words for.
template <class Problem>
void check(cudaError_t code, const char* what, const Problem& problem) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " for " + describe(problem) + ": " + cudaGetErrorString(code));
}

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes;
};

// Runs kernel(params) on the stream; errors as in check.
template <class Params>
void launch(void (*kernel)(Params), const char* name, const LaunchShape& shape, cudaStream_t stream,
            const Params& params) {
  const dim3 threads(static_cast<unsigned>(shape.threads));
  const auto shared_bytes = static_cast<size_t>(shape.shared_bytes);
#ifdef XSEP_EMULATOR
  try {
    emulator::launch(kernel, name, shape.grid, threads, shared_bytes, stream, params);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) + ", for " + describe(params));
  }
#else
  const void* entry = reinterpret_cast<const void*>(kernel);
  constexpr int kWithoutOptIn = 48 * 1024;
  if (shape.shared_bytes > kWithoutOptIn) {
    check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), name, params);
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(entry, shape.grid, threads, arguments, shared_bytes, stream), name, params);
#endif
}

// A plan that asks for a kernel that was not compiled: the planner and the launcher disagree.
template <class Problem>
[[noreturn]] void no_such_kernel(const char* name, const Problem& problem) {
  throw std::runtime_error(std::string(name) + " is not made for " + describe(problem));
}

}  // namespace xsep::cuda
