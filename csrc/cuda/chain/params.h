// What the training chain's kernels between the convolutions are given. Images lie in memory as [N, H, W, C].
#pragma once

#include "../../common/cuda_chain_plan.h"
#include "../depthwise/params.h"

namespace xsep::cuda {

struct ImageShape {
  int n, h, w, c;

  __host__ __device__ int64_t pixels() const { return static_cast<int64_t>(n) * h * w; }
};

// The gradient of a raw output: dr = coef[0] du + coef[1] r + coef[2].
struct RawGradientParams {
  ImageShape shape;  // of r
  ImagePlan plan;
  DataType type;
  const void* du;       // [N, H, W, C], or [N, pooled_h, pooled_w, C] beside taps
  const uint8_t* taps;  // like du: the tap of its 3 x 3 window, in scan order, that an element belongs to; may be null
  const void* r;        // [N, H, W, C]
  const float* coef;    // [3, C]
  void* dr;             // [N, H, W, C]
  int pooled_h, pooled_w;  // windows
  int pad_top, pad_left;   // how far the first window begins above and left of the picture
};

// All of a layer's backward in one pass.
struct FusedBackwardParams {
  ChainBackwardPlan plan;
  RawGradientParams gradient;      // of r [N, H, W, C_out]; without a dr and a plan
  DepthwiseBpropParams depthwise;  // without a dz and a plan; its partials are [workers, 9 + kMostGradientSums, C_in]
  const void* w_pw;                // [C_out, C_in]
  float* dw_pw_partials;           // [workers shares, C_out, C_in]: scratch
  float* dw_pw;                    // [C_out, C_in]
};

struct StatisticsParams {
  ImageShape shape;
  ImagePlan plan;
  DataType type;
  const void* r;    // [N, H, W, C]
  float* partials;  // [T, 3, C]: of each tile of kStatisticsPixels its mean K, sum of r - K and of (r - K)^2
  int* counts;      // [T], pixels of each tile
};

struct ApplyParams {
  ImageShape shape;
  ImagePlan plan;
  DataType type;
  const void* x;         // [N, H, W, C]
  const void* residual;  // [N, H, W, C], added before the activation; may be null
  void* y;               // [N, H, W, C]
  ChannelAffine load;    // over C
};

struct InputGradientParams {
  ImageShape shape;
  ImagePlan plan;
  DataType type;
  const void* e;         // [N, H, W, C], the gradient of act(u)
  const void* x;         // [N, H, W, C]
  const void* residual;  // [N, H, W, C], in u as in apply; may be null
  void* dx;              // [N, H, W, C], the gradient of u; may be null: e, for the sums alone
  float* partials;       // [workers, sums, C]: scratch
  float* sums;           // [sums, C]: of dx as it is stored, and of dx (operand - centre)
  ChannelAffine load;    // u = scale x + shift + residual
  GradientEpilogue epilogue;
};

struct PoolAddParams {
  ImageShape shape;  // of r
  ImagePlan plan;    // over the windows
  DataType type;
  const void* r;       // [N, H, W, C]
  const float* vec;    // [2, C] scale and shift of r
  const void* s;       // [N, pooled_h, pooled_w, C]
  const float* vec_s;  // [2, C] those of s
  void* t;             // [N, pooled_h, pooled_w, C]
  uint8_t* taps;       // [N, pooled_h, pooled_w, C]
  void* chosen;        // [N, pooled_h, pooled_w, C]
  int pooled_h, pooled_w;
  int pad_top, pad_left;
};

struct AverageParams {
  ImageShape shape;
  ImagePlan plan;
  DataType type;
  const void* r;            // [N, H, W, C]
  const float* vec;         // [2, C]
  void* pooled;             // [N, C], the mean of relu(u) over the picture
  float *positive, *total;  // [N, C], pixels with u > 0 and the sum of r over them
};

struct AverageBackwardParams {
  ImageShape shape;
  ImagePlan plan;
  DataType type;
  const void* g;                  // [N, C]
  const void* r;                  // [N, H, W, C]
  const float* vec;               // [2, C]
  const float* mean;              // [C]
  const float *positive, *total;  // [N, C], as forward left them
  void* du;                       // [N, H, W, C]
  float* sums;                    // [2, C]: of du and of du (r - mean)
};

// BatchNorm's vectors from the statistics of tiles.
struct FinalizeParams {
  int channels, tiles, groups;
  const float* partials;              // [tiles, 3, C], as StatisticsParams says
  const int* counts;                  // [tiles]
  double* merged;                     // [groups, 3, C]: scratch
  const float *gamma, *beta;          // [C], may be null: 1, 0
  float *running_mean, *running_var;  // [C], moved; may be null
  int64_t* batches;                   // [], counted up by one; may be null
  int cumulative;                     // the running statistics move by one over the batches, not by momentum
  double momentum, eps;
  float* vec;      // [2, C] scale, shift
  float* centres;  // [2, C], the mean twice
  float* invstd;   // [C]
  double* count;   // [], pixels of all tiles
};

// The three vectors of dr from the two sums of du.
struct BackwardFinalizeParams {
  int channels;
  int batch;              // whether mean and variance were the batch's own; fixed ones have no gradient
  const float* sums;      // [2, C] of du and of du (r - mean)
  const float* mean;      // [C]
  const float* invstd;    // [C]
  const float* gamma;     // [C], may be null: 1
  const double* count;    // []
  float* coef;            // [3, C]
  float *dgamma, *dbeta;  // [C]
};

// A problem in words, for errors.
inline std::string describe(const FinalizeParams& p) {
  return "BatchNorm of " + std::to_string(p.channels) + " channels from " + std::to_string(p.tiles) + " tiles";
}
inline std::string describe(const BackwardFinalizeParams& p) {
  return "BatchNorm's backward of " + std::to_string(p.channels) + " channels";
}

template <class Params>
std::string describe_images(const Params& p) {
  std::ostringstream words;
  words << name_of(p.type) << " images [" << p.shape.n << ", " << p.shape.c << ", " << p.shape.h << ", " << p.shape.w
        << "]";
  return words.str();
}
inline std::string describe(const StatisticsParams& p) { return describe_images(p); }
inline std::string describe(const ApplyParams& p) { return describe_images(p); }
inline std::string describe(const AverageParams& p) { return describe_images(p); }
inline std::string describe(const AverageBackwardParams& p) { return describe_images(p); }

inline std::string describe(const RawGradientParams& p) {
  if (p.taps == nullptr) return describe_images(p);
  std::ostringstream words;
  words << describe_images(p) << ", gradient of " << p.pooled_h << " x " << p.pooled_w << " windows from " << p.pad_top
        << " above and " << p.pad_left << " left";
  return words.str();
}

inline std::string describe(const FusedBackwardParams& p) {
  return describe(p.depthwise) + ", from " + std::to_string(p.gradient.shape.c) + " outputs";
}

inline std::string describe(const InputGradientParams& p) {
  std::ostringstream words;
  words << describe_images(p) << ", " << p.epilogue.sums << " sums";
  if (p.epilogue.shortcut != nullptr) words << ", shortcut to every " << p.epilogue.shortcut_step << ". pixel";
  return words.str();
}

inline std::string describe(const PoolAddParams& p) {
  std::ostringstream words;
  words << describe_images(p) << " in " << p.pooled_h << " x " << p.pooled_w << " windows from " << p.pad_top
        << " above and " << p.pad_left << " left";
  return words.str();
}

}  // namespace xsep::cuda
