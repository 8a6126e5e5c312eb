// The activations' codes, the same in Python (xsep/problem.py), C++ and Triton.
#pragma once

#include <cstdint>

namespace xsep {

enum class Activation : int32_t {
  kIdentity = 0,
  kRelu = 1,
  kRelu6 = 2,
  kSilu = 3,
  kHardswish = 4,
  kGelu = 5,
  kGeluTanh = 6,
  kElu = 7,
  kLeakyRelu = 8,
};

constexpr int32_t kActivations = 9;
static_assert(static_cast<int32_t>(Activation::kLeakyRelu) + 1 == kActivations);

}  // namespace xsep
