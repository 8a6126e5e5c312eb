// From PyTorch's stable tensors to what the chain's params structs hold.
#pragma once

#include "../tensor.h"
#include "params.h"

namespace xsep::cuda {

using OptionalTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

inline ImageShape image_shape(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(is_on_gpu(x) && x.dim() == 4, name, " must be a CUDA tensor [N, C, H, W]");
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

// Windows of 3 x 3 and stride 2 over s, one for each element of t; taps lie as t does.
struct Windows {
  ImageShape shape;
  int pad_top, pad_left;

  Windows(const Tensor& t, const char* name, const ImageShape& s, const Ints& pads) : shape(s) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(2) == (s.h + 1) / 2 && t.size(3) == (s.w + 1) / 2, name,
                    " must be of half the height and width of r");
    STD_TORCH_CHECK(pads.size() == 2, "pads must hold 2 numbers: top, left");
    shape.h = narrow(t.size(2), "pooled H"), shape.w = narrow(t.size(3), "pooled W");
    pad_top = narrow(pads[0], "the padding above"), pad_left = narrow(pads[1], "the padding left");
    STD_TORCH_CHECK(pad_top < 2 && pad_left < 2, "pads must be 0 or 1");
  }
};

inline const uint8_t* taps_of(const Tensor& taps, const Tensor& x, const ImageShape& s) {
  check_device(taps, x, "taps");
  STD_TORCH_CHECK(taps.scalar_type() == ScalarType::Byte, "taps must be uint8");
  return static_cast<const uint8_t*>(nhwc(taps, taps, "taps", s.n, s.c, s.h, s.w));
}

struct RawGradientTensors {
  const Tensor& du;
  const std::optional<Tensor>& taps;
  const Tensor &r, &coef;
};

// All but dr and the plan.
inline RawGradientParams raw_gradient_of(const RawGradientTensors& tensors, const Ints& pads) {
  RawGradientParams p{};
  const Tensor& r = tensors.r;
  const ImageShape& s = p.shape = image_shape(r, "r");
  p.type = type_of(r, "r");
  p.r = image(r, r, "r", s);
  p.coef = floats(tensors.coef, r, "coef", 3 * static_cast<int64_t>(s.c));
  if (tensors.taps.has_value()) {
    const Windows windows(tensors.du, "du", s, pads);
    p.du = image(tensors.du, r, "du", windows.shape);
    p.taps = taps_of(*tensors.taps, r, windows.shape);
    p.pooled_h = windows.shape.h, p.pooled_w = windows.shape.w;
    p.pad_top = windows.pad_top, p.pad_left = windows.pad_left;
  } else {
    p.du = image(tensors.du, r, "du", s);
  }
  return p;
}

// Of du and r 16 bytes are read at a time, and as many taps as those are channels: a picture's may start there where
// its du does not start on 16 taps.
inline bool is_aligned(const RawGradientParams& p) {
  return is_aligned(p.du) && is_aligned(p.taps, 16 / element_bytes(p.type)) && is_aligned(p.r);
}

}  // namespace xsep::cuda
