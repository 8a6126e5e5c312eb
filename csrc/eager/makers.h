// Who can make a call, and how: the operators of the CPU or of a GPU, or PyTorch's convolutions.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/mul.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "call.h"

namespace xsep::eager {

enum class Maker {
  kPython,
  kCpu,
  kCuda,
  kConvolutions,  // PyTorch's, with nothing but a bias around them
};

/// What the checks of a call came to.
struct Checked {
  Maker maker;     // where no gradient is wanted
  Maker training;  // where one is; by operators: with nothing but a bias behind the prologue, as the bprops have it
  std::array<int64_t, 8> geometry;
  std::array<int64_t, 3> activations;  // of prologue, middle, epilogue
  std::array<double, 3> alphas;        // likewise
  at::MemoryFormat images;
};

using Tensors = std::array<OptionalTensor, kTensors>;
using O = const OptionalTensor&;

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Of v where the epilogue's is of v + bias: scale * (v + bias) + shift = scale * v + (scale * bias + shift).
inline OptionalTensor shift_of_all(const Tensors& t) {
  const OptionalTensor &bias = t[kPlaceBias], &shift = t[kShiftE];
  if (!bias) return shift;
  const Tensor moved = t[kScaleE] ? at::mul(*t[kScaleE], *bias) : *bias;
  return shift ? at::add(moved, *shift) : moved;
}

// The operators of a GPU ask for images in NHWC and for everything else without gaps.
inline Tensor nhwc(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }
inline OptionalTensor nhwc(O t) { return t ? OptionalTensor(nhwc(*t)) : std::nullopt; }
inline OptionalTensor dense(O t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

/// run(), whose running out of memory is told in PyTorch's way: operators on its stable ABI cannot.
template <class F>
auto told_as_pytorch(F&& run) {
  try {
    return run();
  } catch (const std::runtime_error& error) {
    const std::string words = error.what();
    TORCH_CHECK_WITH(OutOfMemoryError, words.find("out of memory") == std::string::npos, words);
    throw;
  }
}

// ------------------------------------------------------------------------------------------------------- forwards

inline Tensor cpu_fprop(const Tensors& t, const Checked& checked, O packed) {
  static const auto separable =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, O, O, O, O, O, O, O, at::IntArrayRef, at::IntArrayRef,
                at::ArrayRef<double>, O)>("xsep::cpu_separable_fprop");
  static const auto depthwise = op<Tensor(const Tensor&, const Tensor&, O, O, O, O, at::IntArrayRef, at::IntArrayRef,
                                          at::ArrayRef<double>, bool)>("xsep::cpu_depthwise_fprop");
  const OptionalTensor shift = shift_of_all(t);
  if (!t[kPlacePw]) {
    const auto& [prologue, middle, epilogue] = checked.activations;
    const auto& [alpha_p, alpha_m, alpha_e] = checked.alphas;
    return depthwise.call(*t[kPlaceX], *t[kPlaceDw], t[kScaleP], t[kShiftP], t[kScaleE], shift, checked.geometry,
                          {prologue, epilogue}, {alpha_p, alpha_e}, checked.images == at::MemoryFormat::Contiguous);
  }
  return separable.call(*t[kPlaceX], *t[kPlaceDw], *t[kPlacePw], t[kPlaceResidual], t[kScaleP], t[kShiftP], t[kScaleM],
                        t[kShiftM], t[kScaleE], shift, checked.geometry, checked.activations, checked.alphas, packed);
}

inline Tensor cuda_fprop(const Tensors& t, const Checked& checked) {
  static const auto separable =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, O, O, O, O, O, O, O, O, at::IntArrayRef, at::IntArrayRef,
                at::ArrayRef<double>, bool)>("xsep::cuda_separable_fprop");
  static const auto depthwise =
      op<Tensor(const Tensor&, const Tensor&, O, O, O, O, at::IntArrayRef, at::IntArrayRef, at::ArrayRef<double>)>(
          "xsep::cuda_depthwise_fprop");
  const Tensor x = nhwc(*t[kPlaceX]), w_dw = t[kPlaceDw]->contiguous();
  const OptionalTensor scale_p = dense(t[kScaleP]), shift_p = dense(t[kShiftP]), scale_e = dense(t[kScaleE]);
  if (!t[kPlacePw]) {
    const auto& [prologue, middle, epilogue] = checked.activations;
    const auto& [alpha_p, alpha_m, alpha_e] = checked.alphas;
    return depthwise.call(x, w_dw, scale_p, shift_p, scale_e, dense(shift_of_all(t)), checked.geometry,
                          {prologue, epilogue}, {alpha_p, alpha_e});
  }
  constexpr bool kTf32 = false;  // float32 is not for here: its settings may change between calls
  return separable.call(x, w_dw, t[kPlacePw]->contiguous(), dense(t[kPlaceBias]), nhwc(t[kPlaceResidual]), scale_p,
                        shift_p, dense(t[kScaleM]), dense(t[kShiftM]), scale_e, dense(t[kShiftE]), checked.geometry,
                        checked.activations, checked.alphas, kTf32);
}

/// Of as much padding on one side as on the other.
inline Tensor convolutions(const Tensors& t, const Checked& checked) {
  const at::IntArrayRef g = checked.geometry;
  const std::array<int64_t, 2> padding{g[4], g[2]};
  const OptionalTensor &w_pw = t[kPlacePw], &bias = t[kPlaceBias];
  const auto depthwise = [&](const OptionalTensor& added) {
    return at::conv2d(*t[kPlaceX], *t[kPlaceDw], added, g.slice(0, 2), padding, g.slice(6, 2), t[kPlaceX]->size(1));
  };
  if (w_pw) return at::conv2d(depthwise({}), *w_pw, bias);
  // The gradient of a depthwise convolution's own bias is a sum of one value after another, tens of ulp off.
  const bool differentiated = bias && bias->requires_grad() && at::GradMode::is_enabled();
  return differentiated ? depthwise({}).add_(bias->view({-1, 1, 1})) : depthwise(bias);
}

/// By operators: maker is neither Python nor PyTorch's convolutions.
inline Tensor fprop(Maker maker, const Tensors& t, const Checked& checked, O packed) {
  if (maker == Maker::kCpu) return cpu_fprop(t, checked, packed);
  return told_as_pytorch([&] { return cuda_fprop(t, checked); });
}

// ------------------------------------------------------------------------------------------------------ backwards

/// What a backward needs beside dy; w_pw is undefined where there is none.
struct Saved {
  const Tensor &x, &w_dw, &w_pw;
  const OptionalTensor &scale_p, &shift_p;
  at::IntArrayRef geometry;
  int64_t activation;
  double alpha;
};

struct Wanted {
  bool x, w_dw, w_pw, scale_p, shift_p;
};

/// What is not wanted may be anything.
struct Gradients {
  Tensor x, w_dw, w_pw, scale_p, shift_p;
};

inline Gradients cpu_bprop(const Tensor& dy, const Saved& s, const Wanted& wanted) {
  static const auto separable = op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, O, O, at::IntArrayRef, int64_t, double,
      std::array<bool, 5>)>("xsep::cpu_separable_bprop");
  static const auto depthwise =
      op<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, O, O, at::IntArrayRef,
                                                    int64_t, double, std::array<bool, 4>)>("xsep::cpu_depthwise_bprop");
  Gradients g;
  if (s.w_pw.defined()) {
    std::tie(g.x, g.w_dw, g.w_pw, g.scale_p, g.shift_p) =
        separable.call(dy, s.x, s.w_dw, s.w_pw, s.scale_p, s.shift_p, s.geometry, s.activation, s.alpha,
                       {wanted.x, wanted.w_dw, wanted.w_pw, wanted.scale_p, wanted.shift_p});
  } else {
    std::tie(g.x, g.w_dw, g.scale_p, g.shift_p) =
        depthwise.call(dy, s.x, s.w_dw, s.scale_p, s.shift_p, s.geometry, s.activation, s.alpha,
                       {wanted.x, wanted.w_dw, wanted.scale_p, wanted.shift_p});
  }
  return g;
}

inline Gradients cuda_bprop(const Tensor& dy, const Saved& s, const Wanted& wanted) {
  static const auto separable =
      op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                            O, O, at::IntArrayRef, int64_t, double, at::IntArrayRef)>(
          "xsep::cuda_separable_bprop");
  static const auto depthwise = op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, O, O, O, at::IntArrayRef, int64_t, double, at::IntArrayRef)>(
      "xsep::cuda_depthwise_bprop");
  const Tensor above = nhwc(dy), x = nhwc(s.x), w_dw = s.w_dw.contiguous();
  const OptionalTensor scale_p = dense(s.scale_p), shift_p = dense(s.shift_p);
  Gradients g;
  if (s.w_pw.defined()) {
    std::tie(g.x, g.w_dw, g.w_pw, g.scale_p, g.shift_p) =
        separable.call(above, x, w_dw, s.w_pw.contiguous(), scale_p, shift_p, s.geometry, s.activation, s.alpha,
                       {wanted.x, wanted.w_dw, wanted.w_pw, wanted.scale_p, wanted.shift_p});
  } else {
    std::tie(g.x, g.w_dw, g.scale_p, g.shift_p) =
        depthwise.call(above, x, w_dw, scale_p, shift_p, std::nullopt, s.geometry, s.activation, s.alpha,
                       {wanted.x, wanted.w_dw, wanted.scale_p, wanted.shift_p});
  }
  return g;
}

inline Gradients bprop(Maker maker, const Tensor& dy, const Saved& saved, const Wanted& wanted) {
  if (maker == Maker::kCpu) return cpu_bprop(dy, saved, wanted);
  return told_as_pytorch([&] { return cuda_bprop(dy, saved, wanted); });
}

}  // namespace xsep::eager
