// Plans of separable problems, kept: a planner weighs some hundred ways to cut one, tens of microseconds long.
#pragma once

#include <cstring>
#include <map>
#include <mutex>

#include "../../common/cuda_plan.h"

namespace xsep::cuda {

struct SeparablePlanKey {
  ConvShape shape;
  DeviceProperties device;
  int c_out, element_bytes, aligned;

  bool operator<(const SeparablePlanKey& other) const { return std::memcmp(this, &other, sizeof(*this)) < 0; }
};
static_assert(sizeof(SeparablePlanKey) == sizeof(ConvShape) + sizeof(DeviceProperties) + 3 * sizeof(int) &&
                  sizeof(ConvShape) == 15 * sizeof(int) && sizeof(DeviceProperties) == 3 * sizeof(int),
              "ints without gaps, which can be compared as bytes");

// plan(shape, c_out, element_bytes, aligned, device)
template <class Plan, Plan (*plan)(const ConvShape&, int, int, bool, const DeviceProperties&)>
Plan kept_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned, const DeviceProperties& device) {
  static std::mutex guard;
  static std::map<SeparablePlanKey, Plan> kept;
  constexpr size_t kMostKept = 4096;
  const SeparablePlanKey key{shape, device, c_out, element_bytes, aligned ? 1 : 0};
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  if (kept.size() == kMostKept) kept.clear();
  return kept.emplace(key, plan(shape, c_out, element_bytes, aligned, device)).first->second;
}

}  // namespace xsep::cuda
