#define XSEP_CPU_INSTANCES
#include "kernels.h"

namespace xsep::cpu {

XSEP_CPU_KERNELS(, Half)

}  // namespace xsep::cpu
