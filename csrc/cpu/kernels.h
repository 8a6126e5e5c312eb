// The CPU kernels of one storage type, compiled apart (kernels_*.cpp) so that a build runs in parallel.
#pragma once

#include "depthwise_bprop.h"
#include "depthwise_fprop.h"
#include "pack.h"
#include "plane_fprop.h"
#include "separable_fprop.h"
#include "separable_wgrad.h"

#define XSEP_CPU_KERNELS(PREFIX, T)                                                                                 \
  PREFIX template void bring_rows<T, T>(const InputRows&, int64_t, Range, Range, char*);                            \
  PREFIX template void depthwise_fprop_run<T>(const DepthwiseFprop&, Range, Range, const RunOutput&, RowWindow&);   \
  PREFIX template void plane_fprop_unit<T>(const PlaneFprop&, int64_t, void*);                                      \
  PREFIX template void depthwise_bprop_unit<T>(const DepthwiseBprop&, int64_t, void*);                              \
  PREFIX template void separable_fprop_task<T, T>(const SeparableFprop&, int64_t, RowWindow&, void*);               \
  PREFIX template void make_z<T>(const SeparableFprop&, Range, RowWindow&, char*);                                  \
  PREFIX template void multiply_all_tiles<T>(const SeparableFprop&, int64_t, const char*, const void*, const Soon&, \
                                             float*);                                                               \
  PREFIX template void separable_wgrad_task<T, T>(const SeparableWgrad&, int64_t, RowWindow&, void*);               \
  PREFIX template void multiply_panel<T>(const Pointwise&, const void*, const void*, const Soon&, int64_t, int64_t, \
                                         int64_t, float*);                                                          \
  PREFIX template void pack_depthwise<T>(const T*, int64_t, int64_t, int64_t, int64_t, float*);                     \
  PREFIX template void unpack_depthwise<T>(const double*, Range, int64_t, int64_t, int64_t, T*);                    \
  PREFIX template void pack_panel<T, float>(const PointwisePacking&, const T*, int64_t, float*);                    \
  PREFIX template void interleave_passes<T>(const float*, int64_t, int64_t, int64_t, T*);

namespace xsep::cpu {

#ifndef XSEP_CPU_INSTANCES
XSEP_CPU_KERNELS(extern, float)
XSEP_CPU_KERNELS(extern, BFloat16)
XSEP_CPU_KERNELS(extern, Half)
extern template void bring_rows<BFloat16, float>(const InputRows&, int64_t, Range, Range, char*);
extern template void bring_rows<Half, float>(const InputRows&, int64_t, Range, Range, char*);
extern template void separable_fprop_task<float, BFloat16>(const SeparableFprop&, int64_t, RowWindow&, void*);
extern template void separable_fprop_task<float, Half>(const SeparableFprop&, int64_t, RowWindow&, void*);
extern template void separable_wgrad_task<float, BFloat16>(const SeparableWgrad&, int64_t, RowWindow&, void*);
extern template void separable_wgrad_task<float, Half>(const SeparableWgrad&, int64_t, RowWindow&, void*);
extern template void pack_panel<BFloat16, BFloat16>(const PointwisePacking&, const BFloat16*, int64_t, BFloat16*);
#endif

}  // namespace xsep::cpu
