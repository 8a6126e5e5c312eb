#pragma once

#include "../params.h"

namespace xsep::cuda {

struct DepthwiseFpropParams {
  ConvShape shape;
  DepthwisePlan plan;
  DataType type;
  const void* x;           // [N, H, W, C_in]
  const void* residual;    // [N, H, W, C_in], added before the prologue's activation; may be null
  const void* w_dw;        // [C_mid, 1, R, S]
  void* x_pre;             // [N, H, W, C_in], what the prologue's activation is applied to; null without a residual
  void* y;                 // [N, P, Q, C_mid]
  ChannelAffine prologue;  // over C_in
  ChannelAffine epilogue;  // over C_mid
};

struct DepthwiseBpropParams {
  ConvShape shape;
  DepthwisePlan plan;
  DataType type;
  const void* dz;          // [N, P, Q, C_mid]
  const void* x;           // [N, H, W, C_in]
  const void* w_dw;        // [C_mid, 1, R, S]
  void* dx;                // [N, H, W, C_in], may be null
  void* dw_dw;             // [C_mid, 1, R, S], may be null
  float* dscale;           // [C_in] sum of du (x - centre), may be null
  float* dshift;           // [C_in] sum of du, may be null
  const float* centre;     // [C_in], may be null: 0
  float* partials;         // [workers, R S + 2, C_mid]: scratch
  ChannelAffine prologue;  // over C_in
};

}  // namespace xsep::cuda
