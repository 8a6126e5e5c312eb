#define XSEP_CPU_INSTANCES
#include "kernels.h"

namespace xsep::cpu {

XSEP_CPU_KERNELS(, Half)
template void bring_rows<Half, float>(const InputRows&, int64_t, Range, Range, char*);

}  // namespace xsep::cpu
