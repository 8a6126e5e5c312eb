// From PyTorch's stable tensors to what the params structs hold, with the checks that all ops share.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "params.h"
#include "pytorch.h"
#include "torch_device.h"

namespace xsep::cuda {

inline int narrow(int64_t size, const char* what) {
  STD_TORCH_CHECK(size >= 0 && size <= std::numeric_limits<int>::max(), what, " is ", size,
                  ", and must be 0 to 2^31 - 1");
  return static_cast<int>(size);
}

inline DataType type_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is_on_gpu(t) && t.get_device_index() == x.get_device_index(), name, " must be on the device of x");
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the type of x");
}

// t must be [n, c, h, w] and lie in memory as [n, h, w, c] without gaps.
inline const void* nhwc(const Tensor& t, const Tensor& x, const char* name, int64_t n, int64_t c, int64_t h,
                        int64_t w) {
  check_like(t, x, name);
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == n && t.size(1) == c && t.size(2) == h && t.size(3) == w, name,
                  " must be [", n, ", ", c, ", ", h, ", ", w, "]");
  const int64_t strides[4] = {h * w * c, 1, w * c, c};
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == strides[d], name, " must be contiguous in channels_last");
  }
  return t.const_data_ptr();
}

inline const void* contiguous(const Tensor& t, const Tensor& x, const char* name, int64_t numel) {
  check_like(t, x, name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == numel, name, " must be contiguous, with ", numel, " elements");
  return t.const_data_ptr();
}

inline ChannelVector channel_vector(const std::optional<Tensor>& v, const Tensor& x, const char* name,
                                    int64_t channels) {
  if (!v.has_value()) return {nullptr, 0};
  check_device(*v, x, name);
  const bool is_float32 = v->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float32 || v->scalar_type() == x.scalar_type(), name, " must be float32 or have the type of x");
  STD_TORCH_CHECK(v->is_contiguous() && v->numel() == channels, name, " must be contiguous, with ", channels,
                  " elements");
  return {v->const_data_ptr(), is_float32 ? 1 : 0};
}

struct AffineNames {
  const char *scale, *shift;
};

inline ChannelAffine channel_affine(const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                    int64_t activation, double alpha, const Tensor& x, const AffineNames& names,
                                    int64_t channels) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation code ", activation, " is not known");
  return {channel_vector(scale, x, names.scale, channels), channel_vector(shift, x, names.shift, channels),
          static_cast<Activation>(activation), static_cast<float>(alpha)};
}

// geometry: stride h, w; padding left, right, top, bottom; dilation h, w.
inline ConvShape conv_shape(const Tensor& x, const Tensor& w_dw, const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(is_on_gpu(x) && x.dim() == 4, "x must be a CUDA tensor [N, C_in, H, W]");
  STD_TORCH_CHECK(w_dw.dim() == 4 && w_dw.size(1) == 1, "w_dw must be [C_mid, 1, R, S]");
  STD_TORCH_CHECK(geometry.size() == 8, "geometry must hold 8 numbers, not ", geometry.size());
  for (const int i : {0, 1, 6, 7}) STD_TORCH_CHECK(geometry[i] > 0, "stride and dilation must be positive");
  const auto outputs = [](int64_t size, int64_t padding, int64_t taps, int64_t stride, int64_t dilation) {
    const int64_t room = size + padding - dilation * (taps - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "the filter does not fit into the padded input");
    return room / stride + 1;
  };
  const int64_t p = outputs(x.size(2), geometry[4] + geometry[5], w_dw.size(2), geometry[0], geometry[6]);
  const int64_t q = outputs(x.size(3), geometry[2] + geometry[3], w_dw.size(3), geometry[1], geometry[7]);
  ConvShape s{};
  s.n = narrow(x.size(0), "N"), s.c_in = narrow(x.size(1), "C_in");
  s.h = narrow(x.size(2), "H"), s.w = narrow(x.size(3), "W");
  s.c_mid = narrow(w_dw.size(0), "C_mid"), s.p = narrow(p, "P"), s.q = narrow(q, "Q");
  s.r = narrow(w_dw.size(2), "R"), s.s = narrow(w_dw.size(3), "S");
  s.stride_h = narrow(geometry[0], "stride"), s.stride_w = narrow(geometry[1], "stride");
  s.pad_left = narrow(geometry[2], "padding"), s.pad_top = narrow(geometry[4], "padding");
  s.dilation_h = narrow(geometry[6], "dilation"), s.dilation_w = narrow(geometry[7], "dilation");
  STD_TORCH_CHECK(x.numel() > 0 && w_dw.numel() > 0, "no tensor may be empty");
  STD_TORCH_CHECK(s.c_mid % s.c_in == 0, "w_dw has ", s.c_mid, " filters for ", s.c_in, " channels");
  return s;
}

inline bool is_aligned(const void* p, int bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

inline Tensor new_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return new_tensor(like, {n, c, h, w}, like.scalar_type(), MemoryFormat::ChannelsLast);
}

inline Tensor new_flat(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return new_tensor(like, sizes, type);
}

}  // namespace xsep::cuda
