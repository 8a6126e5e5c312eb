#define XSEP_CPU_INSTANCES
#include "kernels.h"

namespace xsep::cpu {

XSEP_CPU_KERNELS(, float)
template void separable_fprop_task<float, BFloat16>(const SeparableFprop&, int64_t, RowWindow&, void*);
template void separable_fprop_task<float, Half>(const SeparableFprop&, int64_t, RowWindow&, void*);
template void separable_wgrad_task<float, BFloat16>(const SeparableWgrad&, int64_t, RowWindow&, void*);
template void separable_wgrad_task<float, Half>(const SeparableWgrad&, int64_t, RowWindow&, void*);

}  // namespace xsep::cpu
