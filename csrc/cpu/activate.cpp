#include "activate.h"

#include "vec_math.h"

namespace xsep::cpu {
namespace {

constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInvSqrtTwoPi = 0.39894228040143268f;
// gelu's tanh form: 0.5 (1 + tanh(k (u + 0.044715 u^3))) = sigmoid(2 k (u + 0.044715 u^3)), k = sqrt(2 / pi).
constexpr float kTwoSqrtTwoOverPi = 1.5957691216057308f;
constexpr float kGeluCubic = 0.044715f;

Vec gelu_cdf(Vec u) { return 0.5f + 0.5f * erf(u * kSqrtHalf); }
Vec gelu_tanh_argument(Vec u) { return kTwoSqrtTwoOverPi * u * (1.0f + kGeluCubic * u * u); }

Vec activated(Vec u, Activation activation, float alpha) {
  switch (activation) {
    case Activation::kIdentity:
      return u;
    case Activation::kRelu:
      return relu(u);
    case Activation::kRelu6:
      return at_most(relu(u), broadcast(6.0f));
    case Activation::kSilu:
      return u / (1.0f + exp(-u));
    case Activation::kHardswish:
      return u * at_most(relu(u + 3.0f), broadcast(6.0f)) / 6.0f;
    case Activation::kGelu:
      return u * gelu_cdf(u);
    case Activation::kGeluTanh:
      return u * sigmoid(gelu_tanh_argument(u));
    case Activation::kElu:
      return u > 0.0f ? u : alpha * expm1_negative(at_most(u, Vec{}));
    case Activation::kLeakyRelu:
      return u > 0.0f ? u : alpha * u;
  }
  return u;
}

Vec derivative(Vec u, Activation activation, float alpha) {
  const Vec zero = Vec{};
  const Vec one = broadcast(1.0f);
  switch (activation) {
    case Activation::kIdentity:
      return one;
    case Activation::kRelu:
      return u > 0.0f ? one : zero;
    case Activation::kRelu6:
      return u > 0.0f ? (u < 6.0f ? one : zero) : zero;
    case Activation::kSilu: {
      const SigmoidPair s = sigmoid_pair(u);
      return s.value * (1.0f + u * s.complement);
    }
    case Activation::kHardswish: {
      const Vec inside = u > -3.0f ? u / 3.0f + 0.5f : zero;
      return u < 3.0f ? inside : one;
    }
    case Activation::kGelu:
      return gelu_cdf(u) + u * exp(-0.5f * u * u) * kInvSqrtTwoPi;
    case Activation::kGeluTanh: {
      const SigmoidPair s = sigmoid_pair(gelu_tanh_argument(u));
      return s.value + u * s.value * s.complement * kTwoSqrtTwoOverPi * (1.0f + 3.0f * kGeluCubic * u * u);
    }
    case Activation::kElu:
      return u > 0.0f ? one : alpha * exp(at_most(u, zero));
    case Activation::kLeakyRelu:
      return u > 0.0f ? one : broadcast(alpha);
  }
  return one;
}

}  // namespace

void activate_all(Vec* v, int n, Activation activation, float alpha) {
  for (int i = 0; i < n; ++i) v[i] = activated(v[i], activation, alpha);
}

void differentiate_all(Vec* u, int n, Activation activation, float alpha) {
  for (int i = 0; i < n; ++i) u[i] = derivative(u[i], activation, alpha);
}

}  // namespace xsep::cpu
