#pragma once

#include "../../common/cuda_separable_plan.h"
#include "../params.h"

namespace xsep::cuda {

struct SeparableFpropParams {
  ConvShape shape;  // C_mid = C_in
  SeparablePlan plan;
  DataType type;
  int c_out;
  int allow_tf32;        // float32 on tensor cores, as torch.backends.cuda.matmul.allow_tf32 says
  const void* x;         // [N, H, W, C_in]
  const void* addend;    // [N, H, W, C_in], added before the prologue's activation; may be null. Only at stride 1 and
                         // padding of K / 2: each pixel is then the middle of one window
  void* x_pre;           // [N, H, W, C_in], what the prologue's activation is applied to; null without an addend
  const void* w_dw;      // [C_in, 1, R, S]
  const void* w_pw;      // [C_out, C_in]
  const void* residual;  // [N, P, Q, C_out], added before the epilogue's activation; may be null
  void* y;               // [N, P, Q, C_out]
  float* statistics;     // [tiles, 3, C_out]: of each tile of y, its mean K, sum of y - K and of (y - K)^2; may be null
  int* counts;           // [tiles], pixels of each tile; null without statistics
  ChannelVector bias;    // [C_out], may be null
  ChannelAffine prologue;                      // over C_in
  ChannelAffine middle;                        // over C_in
  ChannelAffine epilogue;                      // over C_out
  int has_prologue, has_middle, has_epilogue;  // whether they do anything; set by the launcher
};

inline std::string describe(const SeparableFpropParams& p) {
  return std::string(name_of(p.type)) + " " + describe(p.shape) + ", then " + std::to_string(p.c_out) + " outputs";
}

}  // namespace xsep::cuda
