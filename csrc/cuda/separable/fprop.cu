// Fused separable forward: the choice of a kernel.
#include "fprop.h"

#include <cstring>
#include <map>
#include <mutex>

#include "../launch.cuh"
#include "multiply.cuh"

namespace xsep::cuda {

template <class Policy>
void launch_separable_fprop(const SeparableFpropParams& p, cudaStream_t stream);

void separable_fprop(const SeparableFpropParams& p, cudaStream_t stream) {
  if (!p.plan.fused) no_such_kernel("separable_fprop_kernel", p);
  switch (p.type) {
    case kFloat16:
      launch_separable_fprop<TensorCores16<__half>>(p, stream);
      break;
    case kBFloat16:
      launch_separable_fprop<TensorCores16<__nv_bfloat16>>(p, stream);
      break;
    case kFloat32:
      if (p.allow_tf32 != 0) {
        launch_separable_fprop<TensorCoresTf32>(p, stream);
      } else {
        launch_separable_fprop<Simt32>(p, stream);
      }
      break;
  }
}

namespace {

struct PlanKey {
  ConvShape shape;
  DeviceProperties device;
  int c_out, element_bytes, aligned;

  bool operator<(const PlanKey& other) const { return std::memcmp(this, &other, sizeof(*this)) < 0; }
};
static_assert(sizeof(PlanKey) == sizeof(ConvShape) + sizeof(DeviceProperties) + 3 * sizeof(int) &&
                  sizeof(ConvShape) == 15 * sizeof(int) && sizeof(DeviceProperties) == 3 * sizeof(int),
              "ints without gaps, which can be compared as bytes");

}  // namespace

SeparablePlan kept_separable_plan(const ConvShape& shape, int c_out, int element_bytes, bool aligned,
                                  const DeviceProperties& device) {
  static std::mutex guard;
  static std::map<PlanKey, SeparablePlan> kept;
  constexpr size_t kMostKept = 4096;
  const PlanKey key{shape, device, c_out, element_bytes, aligned ? 1 : 0};
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  if (kept.size() == kMostKept) kept.clear();
  const SeparablePlan plan = plan_separable_fprop(shape, c_out, element_bytes, aligned, device);
  kept.emplace(key, plan);
  return plan;
}

}  // namespace xsep::cuda
