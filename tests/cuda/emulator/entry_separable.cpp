#include "entry.h"
#include "separable/fprop.h"

using namespace xsep::cuda;

extern "C" {

int emulate_separable_fprop(const SeparableFpropParams* p, char* message, size_t bytes) {
  return guarded([&] { separable_fprop(*p, nullptr); }, message, bytes);
}

void emulate_plan_separable_fprop(const ConvShape* c, int c_out, int bytes, int aligned, const DeviceProperties* device,
                                  SeparablePlan* plan) {
  *plan = plan_separable_fprop(*c, c_out, bytes, aligned != 0, *device);
}

size_t emulate_sizeof_separable_fprop() { return sizeof(SeparableFpropParams); }
}
