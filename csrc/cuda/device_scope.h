// The device and the stream that an operator runs on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>
#include <optional>

#include "launch.cuh"
#include "tensor.h"

// Only a PyTorch with CUDA has it. Weak, so that the library loads beside one without, where no CUDA tensor can reach
// it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace xsep::cuda {

inline constexpr int kMostDevices = 64;

inline cudaError_t query_device(int index, DeviceProperties& found) {
  cudaError_t code = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&found.l2_bytes, cudaDevAttrL2CacheSize, index);
  if (code != cudaSuccess) return code;
  return cudaDeviceGetAttribute(&found.shared_bytes_per_cta, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
}

// Makes a tensor's device the current one for as long as this lives.
class DeviceScope {
 public:
  template <class Problem>
  DeviceScope(const Tensor& x, const Problem& problem) : index_(device_index(x)) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                    "PyTorch gives no CUDA stream for device ", index_);
    stream_ = static_cast<cudaStream_t>(stream);
    check(cudaGetDevice(&previous_), "cudaGetDevice", problem);
    if (previous_ == index_) return;
#ifdef XSEP_EMULATOR
    check(cudaSetDevice(index_), "cudaSetDevice", problem);
#else
    guard_.emplace(index_);
#endif
  }
#ifdef XSEP_EMULATOR
  ~DeviceScope() {
    if (previous_ != index_) cudaSetDevice(previous_);
  }
#endif
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaStream_t stream() const { return stream_; }

  template <class Problem>
  const DeviceProperties& properties(const Problem& problem) const {
    STD_TORCH_CHECK(index_ >= 0 && index_ < kMostDevices, "device index ", index_, " is out of range");
    std::call_once(asked()[index_],
                   [&] { check(query_device(index_, known()[index_]), "cudaDeviceGetAttribute", problem); });
    return known()[index_];
  }

 private:
  // Of the whole library, not of one type of problem.
  static std::array<DeviceProperties, kMostDevices>& known() {
    static std::array<DeviceProperties, kMostDevices> found;
    return found;
  }
  static std::array<std::once_flag, kMostDevices>& asked() {
    static std::array<std::once_flag, kMostDevices> flags;
    return flags;
  }

  int index_, previous_ = 0;
#ifndef XSEP_EMULATOR
  // PyTorch's, which gives a device back without making a context there: hundreds of MB of a GPU that nobody uses.
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

}  // namespace xsep::cuda
