// What the Python tests call: the launchers and the planner behind C names.
#include "chain/apply.h"
#include "chain/average.h"
#include "chain/finalize.h"
#include "chain/input_gradient.h"
#include "chain/pool_add.h"
#include "chain/raw_gradient.h"
#include "chain/statistics.h"
#include "entry.h"

using namespace xsep::cuda;

extern "C" {

XSEP_ENTRY(raw_gradient, RawGradientParams)
XSEP_ENTRY(tile_statistics, StatisticsParams)
XSEP_ENTRY(apply_load, ApplyParams)
XSEP_ENTRY(input_gradient, InputGradientParams)
XSEP_ENTRY(pool_add, PoolAddParams)
XSEP_ENTRY(bn_finalize, FinalizeParams)
XSEP_ENTRY(bn_backward_finalize, BackwardFinalizeParams)
XSEP_ENTRY(relu_average, AverageParams)
XSEP_ENTRY(relu_average_backward, AverageBackwardParams)

int emulate_merge_groups(int64_t tiles) { return merge_groups(tiles); }

void emulate_plan_images(int64_t pixels, int channels, int bytes, int aligned, int ctas_per_sm,
                         const DeviceProperties* device, ImagePlan* plan) {
  *plan = plan_images(pixels, channels, bytes, aligned != 0, ctas_per_sm, *device);
}
}
