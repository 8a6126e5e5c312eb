// The one way kernels are launched.
#pragma once

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "device.cuh"
#include "params.h"

namespace xsep::cuda {

// Throws std::runtime_error with the kernel's name, the whole problem and CUDA's words where code is an error. A
// problem is a params struct, or whatever else describe() has words for.
template <class Problem>
void check(cudaError_t code, const char* what, const Problem& problem) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // else PyTorch's next check of a kernel would report it
  throw std::runtime_error(std::string(what) + " for " + describe(problem) + ": " + cudaGetErrorString(code));
}

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes;
};

#ifndef XSEP_EMULATOR
// Has CTAs of a kernel take so much shared memory on the current device. CUDA keeps one limit for each, whoever
// launches: it is never lowered, as another thread may be about to launch with more.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  constexpr int kWithoutOptIn = 48 * 1024;
  if (bytes <= kWithoutOptIn) return cudaSuccess;
  static std::mutex guard;
  static std::map<std::pair<const void*, int>, int> allowed;
  int device = 0;
  const cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  const std::lock_guard<std::mutex> lock(guard);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (refused == cudaSuccess) most = bytes;
  return refused;
}
#endif

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
  check(allow_shared_memory(entry, shape.shared_bytes), name, params);
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
