// What the Python tests call: the launcher and the planner behind C names.
#include "chain/fused_backward.h"
#include "entry.h"

using namespace xsep::cuda;

extern "C" {

XSEP_ENTRY(fused_backward, FusedBackwardParams)

void emulate_plan_chain_backward(const ConvShape* c, int c_out, int bytes, int aligned, const DeviceProperties* device,
                                 ChainBackwardPlan* plan) {
  *plan = plan_chain_backward(*c, c_out, bytes, aligned != 0, *device);
}
}
