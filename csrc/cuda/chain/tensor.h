// From PyTorch's stable tensors to what the chain's params structs hold.
#pragma once

#include "../tensor.h"
#include "params.h"

namespace xsep::cuda {

inline ImageShape image_shape(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, name, " must be a CUDA tensor [N, C, H, W]");
  const ImageShape s{narrow(x.size(0), "N"), narrow(x.size(2), "H"), narrow(x.size(3), "W"), narrow(x.size(1), "C")};
  STD_TORCH_CHECK(s.pixels() > 0 && s.c > 0, "no tensor may be empty");
  return s;
}

inline const void* image(const Tensor& t, const Tensor& x, const char* name, const ImageShape& s) {
  return nhwc(t, x, name, s.n, s.c, s.h, s.w);
}

inline const void* optional_image(const std::optional<Tensor>& t, const Tensor& x, const char* name,
                                  const ImageShape& s) {
  return t.has_value() ? image(*t, x, name, s) : nullptr;
}

inline Tensor new_image(const Tensor& like, const ImageShape& s) { return new_nhwc(like, s.n, s.c, s.h, s.w); }

inline const float* floats(const Tensor& t, const Tensor& x, const char* name, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  return static_cast<const float*>(channel_vector(t, x, name, numel).data);
}

inline float* writable(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// [2, C] scale and shift, or neither.
inline ChannelAffine load_of(const std::optional<Tensor>& vec, int64_t activation, double alpha, const Tensor& x,
                             int64_t channels) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "activation code ", activation, " is not known");
  const float* data = vec.has_value() ? floats(*vec, x, "vec", 2 * channels) : nullptr;
  const float* shift = data == nullptr ? nullptr : data + channels;
  return {{data, 1}, {shift, 1}, static_cast<Activation>(activation), static_cast<float>(alpha)};
}

struct EpilogueTensors {
  const std::optional<Tensor>&shortcut, &operand_1, &operand_2, &centres;
};

inline GradientEpilogue gradient_epilogue(const EpilogueTensors& tensors, bool before_mask, const Tensor& x,
                                          const ImageShape& s) {
  GradientEpilogue epilogue{};
  epilogue.shortcut_step = 1;
  epilogue.before_mask = before_mask ? 1 : 0;
  if (tensors.shortcut.has_value()) {
    const Tensor& t = *tensors.shortcut;
    const bool whole = t.dim() == 4 && t.size(2) == s.h && t.size(3) == s.w;
    epilogue.shortcut_step = whole ? 1 : 2;
    const ImageShape half{s.n, (s.h + 1) / 2, (s.w + 1) / 2, s.c};
    epilogue.shortcut = image(t, x, "shortcut", whole ? s : half);
  }
  epilogue.operands[0] = optional_image(tensors.operand_1, x, "operand_1", s);
  epilogue.operands[1] = optional_image(tensors.operand_2, x, "operand_2", s);
  STD_TORCH_CHECK(epilogue.operands[1] == nullptr || epilogue.operands[0] != nullptr, "operand_2 needs operand_1");
  epilogue.sums = 1 + (epilogue.operands[0] != nullptr ? 1 : 0) + (epilogue.operands[1] != nullptr ? 1 : 0);
  if (epilogue.sums > 1) {
    STD_TORCH_CHECK(tensors.centres.has_value(), "operands need centres");
    epilogue.centres = floats(*tensors.centres, x, "centres", static_cast<int64_t>(epilogue.sums) * s.c);
  }
  return epilogue;
}

inline bool is_aligned(const GradientEpilogue& epilogue, int bytes = 16) {
  return is_aligned(epilogue.shortcut, bytes) && is_aligned(epilogue.operands[0], bytes) &&
         is_aligned(epilogue.operands[1], bytes);
}

}  // namespace xsep::cuda
