// The activations, chosen at run time.
#pragma once

#include <cmath>

#include "../common/activation.h"
#include "device.cuh"

namespace xsep::cuda {

// Which activation, and elu's scale or leaky_relu's slope.
struct ActivationChoice {
  Activation code;
  float alpha;
};

__device__ __forceinline__ float sigmoid(float u) { return 1.0f / (1.0f + expf(-u)); }

__device__ __forceinline__ float gelu_tanh_argument(float u) {
  return 0.7978845608028654f * (u + 0.044715f * u * u * u);  // sqrt(2 / pi)
}

template <int COUNT, class Function>
__device__ __forceinline__ void map(float (&u)[COUNT], Function f) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) u[i] = f(u[i]);
}

template <int GROUPS, int COUNT, class Function>
__device__ __forceinline__ void map(float (&u)[GROUPS][COUNT], Function f) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) map(u[g], f);
}

// Those that take a few instructions, and those that take a few dozen.
__device__ __forceinline__ bool is_cheap(Activation code) {
  return code != Activation::kSilu && code != Activation::kGelu && code != Activation::kGeluTanh &&
         code != Activation::kElu;
}

// A NaN stays a NaN in every activation: comparisons are written so that it fails them.
// Registers of any shape, so that the choice is made once for all of them.
template <class Registers>
__device__ __forceinline__ void activate_cheap(Registers& u, const ActivationChoice& activation) {
  const float alpha = activation.alpha;
  switch (activation.code) {
    case Activation::kRelu:
      map(u, [](float v) { return max_nan(v, 0.0f); });
      break;
    case Activation::kRelu6:
      map(u, [](float v) { return min_nan(max_nan(v, 0.0f), 6.0f); });
      break;
    case Activation::kLeakyRelu:
      map(u, [=](float v) { return v > 0.0f ? v : v * alpha; });
      break;
    case Activation::kHardswish:
      map(u, [](float v) { return v * (min_nan(max_nan(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f)); });
      break;
    default:
      break;
  }
}

template <int COUNT>
__device__ __forceinline__ void activate_costly(float (&u)[COUNT], const ActivationChoice& activation) {
  const float alpha = activation.alpha;
  switch (activation.code) {
    case Activation::kElu:
      map(u, [=](float v) { return v > 0.0f ? v : alpha * expm1f(v); });
      break;
    case Activation::kSilu:
      map(u, [](float v) { return v * sigmoid(v); });
      break;
    case Activation::kGelu:
      map(u, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.7071067811865476f)); });
      break;
    case Activation::kGeluTanh:
      map(u, [](float v) { return 0.5f * v * (1.0f + tanhf(gelu_tanh_argument(v))); });
      break;
    default:
      break;
  }
}

template <int COUNT>
__device__ __forceinline__ void activate(float (&u)[COUNT], const ActivationChoice& activation) {
  if (is_cheap(activation.code)) {
    activate_cheap(u, activation);
  } else {
    activate_costly(u, activation);
  }
}

// The same for many registers. The costly ones are written out for one group only, and the groups take turns in its
// place: a register cannot be indexed, and every group written out would be thousands of instructions.
template <int GROUPS, int COUNT>
__device__ __forceinline__ void activate_groups(float (&u)[GROUPS][COUNT], const ActivationChoice& activation) {
  if (is_cheap(activation.code)) {
    activate_cheap(u, activation);
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < GROUPS; ++turn) {
    float first[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) first[i] = u[0][i];
    activate_costly(first, activation);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int g = 1; g < GROUPS; ++g) u[g - 1][i] = u[g][i];
      u[GROUPS - 1][i] = first[i];
    }
  }
}

// act'(u), with PyTorch's conventions at the kinks, in the place of u.
template <class Registers>
__device__ __forceinline__ void activation_slope(Registers& u, const ActivationChoice& activation) {
  const float alpha = activation.alpha;
  switch (activation.code) {
    case Activation::kRelu:
      map(u, [](float v) { return v > 0.0f ? 1.0f : 0.0f; });
      break;
    case Activation::kRelu6:
      map(u, [](float v) { return v > 0.0f && v < 6.0f ? 1.0f : 0.0f; });
      break;
    case Activation::kLeakyRelu:
      map(u, [=](float v) { return v > 0.0f ? 1.0f : alpha; });
      break;
    case Activation::kElu:
      map(u, [=](float v) { return v > 0.0f ? 1.0f : alpha * expf(v); });
      break;
    case Activation::kSilu:
      map(u, [](float v) { return sigmoid(v) * (1.0f + v * (1.0f - sigmoid(v))); });
      break;
    case Activation::kHardswish:
      map(u, [](float v) { return v <= -3.0f ? 0.0f : (v >= 3.0f ? 1.0f : v * (1.0f / 3.0f) + 0.5f); });
      break;
    case Activation::kGelu:  // cdf + u pdf
      map(u, [](float v) {
        return 0.5f * (1.0f + erff(v * 0.7071067811865476f)) + v * 0.3989422804014327f * expf(-0.5f * v * v);
      });
      break;
    case Activation::kGeluTanh:
      map(u, [](float v) {
        const float t = tanhf(gelu_tanh_argument(v));
        const float slope = 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * v * v);
        return 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * slope;
      });
      break;
    default:
      map(u, [](float) { return 1.0f; });
      break;
  }
}

// d *= act'(u); where the slope is 0 or 1, it chooses, which takes an instruction less.
template <int GROUPS, int COUNT>
__device__ __forceinline__ void multiply_by_slope(float (&d)[GROUPS][COUNT], float (&u)[GROUPS][COUNT],
                                                  const ActivationChoice& activation) {
  const auto for_each = [&](auto combine) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) d[g][i] = combine(d[g][i], u[g][i]);
    }
  };
  switch (activation.code) {
    case Activation::kIdentity:
      break;
    case Activation::kRelu:
      for_each([](float gradient, float v) { return v > 0.0f ? gradient : 0.0f; });
      break;
    case Activation::kRelu6:
      for_each([](float gradient, float v) { return v > 0.0f && v < 6.0f ? gradient : 0.0f; });
      break;
    default:
      activation_slope(u, activation);
      for_each([](float gradient, float slope) { return gradient * slope; });
      break;
  }
}

}  // namespace xsep::cuda
