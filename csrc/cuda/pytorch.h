// Calls of PyTorch's own operators, whose errors keep their words.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

// From PyTorch 2.13 on: what the last error of this thread said. Weak: the library is built for older ones too, which
// print it instead.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace xsep::cuda {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The one result of an operator. The macros of PyTorch's headers throw without the reason, and who is out of memory has
// to be told. Throws std::runtime_error.
template <class... Arguments>
Tensor call_pytorch(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error(torch_exception_get_what_without_backtrace != nullptr
                                 ? std::string(torch_exception_get_what_without_backtrace())
                                 : std::string("PyTorch's ") + name + " failed, and printed why");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type,
                         std::optional<MemoryFormat> format = std::nullopt) {
  try {
    return call_pytorch("aten::empty", "memory_format", IntHeaderOnlyArrayRef(sizes), std::optional(type),
                        std::optional<torch::headeronly::Layout>(), std::optional(like.device()), std::optional<bool>(),
                        format);
  } catch (const std::runtime_error& error) {
    if (torch_exception_get_what_without_backtrace != nullptr) throw;
    throw std::runtime_error("out of memory, it seems: " + std::string(error.what()));
  }
}

}  // namespace xsep::cuda
