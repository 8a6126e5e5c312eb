// The second stage of dw_pw: rows of partials added up.
#include "wgrad_sums.h"

#include "../depthwise/row_sums.cuh"

namespace xsep::cuda {

namespace {

__global__ void __launch_bounds__(kSumThreads) sum_dw_pw_kernel(const __grid_constant__ DwPwSumParams p) {
  const int64_t count = static_cast<int64_t>(p.c_out) * p.c_in, i = column_of_thread();
  sum_rows(p.partials, p.rows, count, i < count, [&](float total) { p.dw_pw[i] = total; });
}

}  // namespace

void sum_dw_pw(const DwPwSumParams& p, cudaStream_t stream) {
  const int64_t count = static_cast<int64_t>(p.c_out) * p.c_in;
  launch(sum_dw_pw_kernel, "sum_dw_pw_kernel", row_sums_launch(count), stream, p);
}

}  // namespace xsep::cuda
