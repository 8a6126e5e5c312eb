// Products of matrices, which PyTorch makes, over the pixels of NHWC images.
#pragma once

#include "tensor.h"

namespace xsep::cuda {

// t's memory, from its first element on, by other sizes and strides.
inline Tensor seen_as(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  return call_pytorch("aten::as_strided", "", t, IntHeaderOnlyArrayRef(sizes), IntHeaderOnlyArrayRef(strides),
                      std::optional<int64_t>());
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

inline Tensor mm(const Tensor& a, const Tensor& b) { return call_pytorch("aten::mm", "", a, b); }

// The same in float32: sums over all pixels, which PyTorch may else add up in 16 bits, part by part.
inline Tensor wide_mm(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == ScalarType::Float) return mm(a, b);
#ifdef XSEP_EMULATOR  // a CPU has no such product
  return mm(torch::stable::to(a, ScalarType::Float), torch::stable::to(b, ScalarType::Float));
#else
  return call_pytorch("aten::mm", "dtype", a, b, ScalarType::Float);
#endif
}

// rows [pixels, C_in] of images, weights [C_out, C_in], bias [C_out] or none -> [pixels, C_out].
inline Tensor linear(const Tensor& rows, const Tensor& weights, const std::optional<Tensor>& bias) {
  return call_pytorch("aten::linear", "", rows, weights, bias);
}

}  // namespace xsep::cuda
