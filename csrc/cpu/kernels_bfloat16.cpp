#define XSEP_CPU_INSTANCES
#include "kernels.h"

namespace xsep::cpu {

XSEP_CPU_KERNELS(, BFloat16)
template void bring_rows<BFloat16, float>(const InputRows&, int64_t, Range, Range, char*);
template void pack_panel<BFloat16, BFloat16>(const PointwisePacking&, const BFloat16*, int64_t, BFloat16*);

}  // namespace xsep::cpu
