// What every op's params struct is made of; plain data, which the emulator's tests fill in too.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <string>

#include "../common/activation.h"
#include "../common/cuda_plan.h"

namespace xsep::cuda {

enum DataType : int { kFloat32, kFloat16, kBFloat16 };

inline int element_bytes(DataType type) { return type == kFloat32 ? 4 : 2; }

inline const char* name_of(DataType type) {
  return type == kFloat32 ? "float32" : (type == kFloat16 ? "float16" : "bfloat16");
}

// A convolution in words, for errors.
inline std::string describe(const ConvShape& c) {
  std::ostringstream words;
  words << "x [" << c.n << ", " << c.c_in << ", " << c.h << ", " << c.w << "], depthwise filter " << c.r << " x " << c.s
        << " to " << c.c_mid << " channels of " << c.p << " x " << c.q << ", stride " << c.stride_h << " x "
        << c.stride_w << ", padding " << c.pad_top << " above and " << c.pad_left << " left, dilation " << c.dilation_h
        << " x " << c.dilation_w;
  return words.str();
}

// A per-channel vector, in float32 or in the type of x; data may be null.
struct ChannelVector {
  const void* data;  // [C]
  int is_float32;
};

// act(scale * v + shift) per channel, the activation and its alpha as in activation.cuh.
struct ChannelAffine {
  ChannelVector scale;  // 1 where null
  ChannelVector shift;  // 0 where null
  Activation activation;
  float alpha;

  __host__ __device__ bool is_identity() const {
    return scale.data == nullptr && shift.data == nullptr && activation == Activation::kIdentity;
  }
};

inline constexpr int kMostOperands = kMostGradientSums - 1;

// In the training chain: what joins the gradient of act(u) on its way to that of u, and what is added up of it.
struct GradientEpilogue {
  const void* shortcut;  // [N, H, W, C], or [N, ceil(H / 2), ceil(W / 2), C] where shortcut_step is 2; may be null
  int shortcut_step;     // rows and columns of dx between two of the shortcut's
  int before_mask;       // whether the shortcut is added before the activation's derivative is applied
  int sums;              // rows of the sums: 1 + operands
  const void* operands[kMostOperands];  // [N, H, W, C], null where there is none
  const float* centres;                 // [sums, C], its first row unused; null without operands
};

}  // namespace xsep::cuda
