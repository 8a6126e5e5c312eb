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
  float* statistics;       // [workers, 3, C_mid]: of what each CTA stores of y, its mean K, sum of y - K and of
                           // (y - K)^2; may be null, and is where there is no sliding window
  int* counts;             // [workers], pixels of each CTA; null without statistics
  ChannelAffine prologue;  // over C_in
  ChannelAffine epilogue;  // over C_mid
};

struct DepthwiseBpropParams {
  ConvShape shape;
  DepthwisePlan plan;
  DataType type;
  const void* dz;             // [N, P, Q, C_mid]
  const void* x;              // [N, H, W, C_in]
  const void* w_dw;           // [C_mid, 1, R, S]
  void* dx;                   // [N, H, W, C_in], may be null
  void* dw_dw;                // [C_mid, 1, R, S], may be null
  float* dscale;              // [C_in] sum of du (x - centre), may be null
  float* dshift;              // [C_in] sum of du, may be null
  const float* centre;        // [C_in], may be null: 0
  float* partials;            // [workers, R S + kMostGradientSums, C_mid]: scratch
  ChannelAffine prologue;     // over C_in
  GradientEpilogue epilogue;  // of the training chain: with sums, dx is the gradient of scale x + shift, and the sums
                              // are of dx; dscale, dshift and centre are null. sums is 0 elsewhere
};

// The second stage of the sums, and of the sums of several slices of a batch.
struct SumPartialsParams {
  ConvShape shape;
  DataType type;                      // of dw_dw
  int rows;                           // workers of all slices
  const float* partials;              // [rows, R S + kMostGradientSums, C_mid]
  void* dw_dw;                        // [C_mid, 1, R, S], may be null
  float* vectors[kMostGradientSums];  // [C_in] each, may be null
};

inline std::string describe(const DepthwiseFpropParams& p) {
  return std::string(name_of(p.type)) + " " + describe(p.shape);
}
inline std::string describe(const DepthwiseBpropParams& p) {
  return std::string(name_of(p.type)) + " " + describe(p.shape);
}
inline std::string describe(const SumPartialsParams& p) {
  return std::to_string(p.rows) + " partial sums, gradients of " + describe(p.shape);
}

}  // namespace xsep::cuda
