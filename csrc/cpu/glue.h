// Between torch's tensors and the kernels, which know nothing of torch: checks of what memory safety rests on, layouts,
// and parameters in the kernels' order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "kernels.h"

namespace xsep::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// f(T{}) with the kernels' name of a dtype.
template <class F>
void with_storage(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(BFloat16{});
    case at::kHalf:
      return f(Half{});
    default:
      TORCH_CHECK_TYPE(false, "xsep's CPU kernels take float32, bfloat16 and float16, not ", dtype);
  }
}

/// t [N, C, H, W] in NHWC, in NCHW: a tensor that is dense in the other of the two is turned round by our own kernel,
/// whatever else by PyTorch.
Tensor to_nhwc(const Tensor& t);
Tensor to_nchw(const Tensor& t);

/// Whether a tensor's planes follow each other, and not its pixels.
inline bool is_nchw(const Tensor& t) { return t.is_contiguous() && !t.is_contiguous(at::MemoryFormat::ChannelsLast); }

/// The layout PyTorch's convolutions would choose: channels_last as soon as the input or a weight is.
inline bool wants_nhwc(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; });
}

/// Not yet written, in large pages where it is large: see memory.cpp.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

inline Tensor empty_image(at::IntArrayRef sizes, const Tensor& like, at::MemoryFormat format) {
  return empty(sizes, like.options().memory_format(format));
}

inline Tensor empty_image(at::IntArrayRef sizes, const Tensor& like, bool nchw) {
  return empty_image(sizes, like, nchw ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

inline Tensor empty_nhwc(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  return empty_image({n, c, h, w}, like, at::MemoryFormat::ChannelsLast);
}

inline Tensor zeros_float(at::IntArrayRef sizes) { return at::zeros(sizes, at::TensorOptions().dtype(at::kFloat)); }

inline Tensor empty_bytes(int64_t bytes) { return empty({bytes}, at::TensorOptions().dtype(at::kByte)); }

inline void check_input(const Tensor& t, at::ScalarType dtype, int64_t dim, const char* name) {
  TORCH_CHECK(t.dim() == dim && t.is_cpu() && t.scalar_type() == dtype, name, " must be a ", dim, "-d CPU tensor of ",
              dtype, ", but is ", t.dim(), "-d on ", t.device(), " of ", t.scalar_type());
}

/// x [N, C, H, W], w_dw [C * multiplier, 1, R, S]
inline DepthwiseShape checked_shape(const Tensor& x, const Tensor& w_dw, at::IntArrayRef geometry) {
  check_input(x, x.scalar_type(), 4, "x");
  check_input(w_dw, x.scalar_type(), 4, "w_dw");
  TORCH_CHECK(geometry.size() == 8, "geometry must have 8 numbers, but has ", geometry.size());
  for (int i : {0, 1, 6, 7}) TORCH_CHECK(geometry[i] > 0, "stride and dilation must be positive: ", geometry);
  const Geometry g{geometry[0], geometry[1], geometry[2], geometry[3],
                   geometry[4], geometry[5], geometry[6], geometry[7]};
  DepthwiseShape s{};
  s.n = x.size(0);
  s.c = x.size(1);
  s.h = x.size(2);
  s.w = x.size(3);
  s.r = w_dw.size(2);
  s.s = w_dw.size(3);
  s.geometry = g;
  s.set_output_size();
  TORCH_CHECK(s.c > 0 && w_dw.size(0) > 0 && w_dw.size(0) % s.c == 0 && w_dw.size(1) == 1,
              "w_dw must be [C_in * m, 1, R, S] for an x of ", s.c, " channels, but is ", w_dw.sizes());
  TORCH_CHECK(s.r > 0 && s.s > 0 && s.p > 0 && s.q > 0, "the filter does not fit: output would be ", s.p, " by ", s.q);
  s.multiplier = w_dw.size(0) / s.c;
  // Where it is not gone a step, a stride counts for nothing; but room is made for the rows between two of the output.
  if (s.p == 1) s.geometry.stride_h = std::min(g.stride_h, s.h + g.pad_top + g.pad_bottom);
  if (s.q == 1) s.geometry.stride_w = std::min(g.stride_w, s.w + g.pad_left + g.pad_right);
  return s;
}

/// Per-channel parameters as the kernels want them: float, padded, in the order of passes. Holds the memory.
class AffineBuffers {
 public:
  /// scale, shift [c * multiplier] or none -> [multiplier, padded]
  AffineBuffers(const OptionalTensor& scale, const OptionalTensor& shift, int64_t c, int64_t multiplier, int64_t padded,
                int64_t activation, double alpha) {
    TORCH_CHECK(activation >= 0 && activation < kActivations, "unknown activation code ", activation);
    affine_.scale = fill(scale, c, multiplier, padded, scale_);
    affine_.shift = fill(shift, c, multiplier, padded, shift_);
    affine_.activation = static_cast<Activation>(activation);
    affine_.alpha = static_cast<float>(alpha);
  }
  const ChannelAffine& affine() const { return affine_; }

 private:
  static const float* fill(const OptionalTensor& v, int64_t c, int64_t multiplier, int64_t padded, Tensor& to) {
    if (!v) return nullptr;
    TORCH_CHECK(v->is_cpu() && v->numel() == c * multiplier, "expected ", c * multiplier,
                " values a channel vector on the CPU, got ", v->sizes(), " on ", v->device());
    const Tensor from = v->to(at::kFloat).contiguous();
    const float* in = from.const_data_ptr<float>();
    to = zeros_float({multiplier, padded});
    float* out = to.mutable_data_ptr<float>();
    for (int64_t j = 0; j < c * multiplier; ++j) out[pass_order(j, multiplier, padded)] = in[j];
    return out;
  }

  ChannelAffine affine_;
  Tensor scale_, shift_;
};

inline Tensor packed_depthwise(const Tensor& w_dw, const DepthwiseShape& shape, int64_t c_pad) {
  Tensor packed = zeros_float({shape.multiplier, shape.taps(), c_pad});
  const Tensor w = w_dw.contiguous();
  with_storage(w.scalar_type(), [&](auto t) {
    using T = decltype(t);
    pack_depthwise(static_cast<const T*>(w.const_data_ptr()), shape.c, shape.multiplier, shape.taps(), c_pad,
                   packed.mutable_data_ptr<float>());
  });
  return packed;
}

/// x, weights and prologue of a depthwise forward, ready for the kernels. Holds the memory.
class DepthwiseInputs {
 public:
  /// visits: how often each row of x is read, by one task or another.
  DepthwiseInputs(const Tensor& x, const Tensor& w_dw, const OptionalTensor& scale_p, const OptionalTensor& shift_p,
                  int64_t activation, double alpha, const DepthwiseShape& shape, int64_t visits)
      : params{},
        x_(x),
        c_pad_(table_row(shape.c)),
        w_(packed_depthwise(w_dw, shape, c_pad_)),
        prologue_(scale_p, shift_p, shape.c, 1, c_pad_, activation, alpha),
        dtype_(x.scalar_type()) {
    params.shape = shape;
    params.c_pad = c_pad_;
    params.w = w_.const_data_ptr<float>();
    params.input = input_rows(shape, visits);
#if defined(__AVX512BW__)
    if (kHasBFloat16Instructions && dtype_ == at::kBFloat16 && paired_channels(shape.c) > 0 && slides(shape) &&
        has_pairs(shape.s)) {
      pack_pairs();
    }
#endif
  }

  /// That the kernels read: float where a prologue's results would have to be rounded for x's own.
  at::ScalarType dtype() const { return dtype_; }

  DepthwiseFprop params;

 private:
  InputRows input_rows(const DepthwiseShape& s, int64_t visits) {
    const ChannelAffine& a = prologue_.affine();
    const bool nchw = is_nchw(x_);
    const int threads = at::get_num_threads();
    const bool by_rows = cpu_brings_rows(s, nchw, threads, visits, x_.element_size());
    if (!nchw || (a.is_identity() && !by_rows)) x_ = to_nhwc(x_);
    InputRows in{};
    in.x = x_.const_data_ptr();
    in.nchw = !x_.is_contiguous(at::MemoryFormat::ChannelsLast);
    in.c = s.c, in.h = s.h, in.w = s.w;
    in.x_element_bytes = x_.element_size();
    in.prologue = a;
    const bool lies_ready = !in.nchw && a.is_identity();
    const bool spread = lies_ready && cpu_spreads_pixels(s, threads, visits, kLanes, x_.element_size());
    if (lies_ready && !spread) return in;
    const bool clamps = a.activation == Activation::kRelu || a.activation == Activation::kRelu6;
    const bool exact = a.is_identity() || (clamps && !a.scale && !a.shift);
    if (!exact) dtype_ = at::kFloat;
    in.element_bytes = static_cast<int64_t>(at::elementSize(dtype_));
    with_storage(x_.scalar_type(), [&](auto t) {
      using T = decltype(t);
      in.bring = dtype_ == at::kFloat ? bring_rows<T, float> : bring_rows<T, T>;
    });
    if (!by_rows && !spread) return brought_beforehand(in, s);
    const CpuRowsPlan plan = plan_cpu_rows(s, in.nchw);
    in.slots = plan.slots;
    in.at_once = plan.at_once;
    in.left = s.geometry.pad_left;
    in.row_columns = plan.columns;
    in.pixel_step = brought_pixel_step(s.c, in.element_bytes);
    return in;
  }

  /// The same rows side by side: NHWC, to be read where it lies.
  InputRows brought_beforehand(InputRows in, const DepthwiseShape& s) {
    const Tensor all =
        empty_image({s.n, s.c, s.h, s.w}, at::empty({0}, x_.options().dtype(dtype_)), at::MemoryFormat::ChannelsLast);
    in.slots = s.h;
    in.row_columns = s.w;
    in.pixel_step = s.c;
    char* const out = static_cast<char*>(all.mutable_data_ptr());
    const int64_t picture_bytes = s.h * in.row_bytes();
    at::parallel_for(0, s.n * s.h, std::max<int64_t>(32768 / (s.w * s.c), 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end;) {
        const int64_t picture = row / s.h, first = row - picture * s.h;
        const Range rows{first, std::min(s.h, first + end - row)};
        in.bring(in, picture, rows, {0, s.c}, out + picture * picture_bytes);
        row += rows.end - rows.begin;
      }
    });
    x_ = all;
    in.x = all.const_data_ptr();
    in.nchw = false;
    in.bring = nullptr;
    return in;
  }

#if defined(__AVX512BW__)
  void pack_pairs() {
    const DepthwiseShape& s = params.shape;
    params.c_pairs = round_up(paired_channels(s.c), kPairChannels);
    const int64_t size = pair_weights_size(s.r, s.s, params.c_pairs);
    w_pairs_ = at::empty({s.multiplier, size}, at::TensorOptions().dtype(at::kInt));
    auto* out = static_cast<uint32_t*>(w_pairs_.mutable_data_ptr());
    for (int64_t i = 0; i < s.multiplier; ++i) {
      pack_pair_weights(params.w + i * s.taps() * c_pad_, s.r, s.s, c_pad_, params.c_pairs, out + i * size);
    }
    params.w_pairs = out;
  }
#endif

  Tensor x_;
  int64_t c_pad_;
  Tensor w_, w_pairs_;
  AffineBuffers prologue_;
  at::ScalarType dtype_;
};

inline Storage storage_of(at::ScalarType dtype) {
  Storage storage{};
  with_storage(dtype, [&](auto t) { storage = xsep::cpu::storage_of<decltype(t)>(); });
  return storage;
}

}  // namespace xsep::cpu
