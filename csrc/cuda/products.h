// Products of matrices, which PyTorch makes, over the pixels of NHWC images.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "tensor.h"

namespace xsep::cuda {

// t's memory, from its first element on, by other sizes and strides.
inline Tensor seen_as(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(t), from(torch::headeronly::IntHeaderOnlyArrayRef(sizes)),
                                    from(torch::headeronly::IntHeaderOnlyArrayRef(strides)), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::as_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Of a tensor without gaps, [rows, columns] in memory.
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return seen_as(t, {rows, columns}, {columns, 1});
}

inline Tensor transposed_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return seen_as(t, {columns, rows}, {1, columns});
}

// Rows of pixels as the images they are.
inline Tensor images(const Tensor& rows, int64_t n, int64_t c, int64_t h, int64_t w) {
  return seen_as(rows, {n, c, h, w}, {h * w * c, 1, w * c, c});
}

inline Tensor mm(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(a), from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// rows [pixels, C_in] of images, weights [C_out, C_in], bias [C_out] or none -> [pixels, C_out].
inline Tensor linear(const Tensor& rows, const Tensor& weights, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(rows), from(weights), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace xsep::cuda
