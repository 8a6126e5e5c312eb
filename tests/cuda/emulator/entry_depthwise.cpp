// What the Python tests call: the launchers and the planner behind C names.
#include "depthwise/bprop.h"
#include "depthwise/fprop.h"
#include "entry.h"

using namespace xsep::cuda;

extern "C" {

int emulate_depthwise_fprop(const DepthwiseFpropParams* p, char* message, size_t bytes) {
  return guarded([&] { depthwise_fprop(*p, nullptr); }, message, bytes);
}

int emulate_depthwise_bprop(const DepthwiseBpropParams* p, char* message, size_t bytes) {
  return guarded([&] { depthwise_bprop(*p, nullptr); }, message, bytes);
}

int emulate_depthwise_bprop_partials(const DepthwiseBpropParams* p, char* message, size_t bytes) {
  return guarded([&] { depthwise_bprop_partials(*p, nullptr); }, message, bytes);
}

int emulate_sum_bprop_partials(const SumPartialsParams* p, char* message, size_t bytes) {
  return guarded([&] { sum_bprop_partials(*p, nullptr); }, message, bytes);
}

void emulate_plan_depthwise_fprop(const ConvShape* c, int bytes, int aligned, const DeviceProperties* device,
                                  DepthwisePlan* plan) {
  *plan = plan_depthwise_fprop(*c, bytes, aligned != 0, *device);
}

void emulate_plan_depthwise_bprop(const ConvShape* c, int bytes, int aligned, const DeviceProperties* device,
                                  DepthwisePlan* plan) {
  *plan = plan_depthwise_bprop(*c, bytes, aligned != 0, *device);
}

size_t emulate_sizeof_depthwise_fprop() { return sizeof(DepthwiseFpropParams); }
size_t emulate_sizeof_depthwise_bprop() { return sizeof(DepthwiseBpropParams); }
size_t emulate_sizeof_depthwise_bprop_partials() { return sizeof(DepthwiseBpropParams); }
size_t emulate_sizeof_sum_bprop_partials() { return sizeof(SumPartialsParams); }
}
