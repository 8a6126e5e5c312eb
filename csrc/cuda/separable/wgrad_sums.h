#pragma once

#include <string>

#include "../device.cuh"

namespace xsep::cuda {

struct DwPwSumParams {
  int c_out, c_in;
  int rows;
  const float* partials;  // [rows, C_out, C_in]
  float* dw_pw;           // [C_out, C_in]
};

inline std::string describe(const DwPwSumParams& p) {
  return std::to_string(p.rows) + " partial sums of dw_pw [" + std::to_string(p.c_out) + ", " + std::to_string(p.c_in) +
         "]";
}

// The second stage of dw_pw, of which each CTA and share of its warps has left a partial. Throws std::runtime_error
// where CUDA refuses.
void sum_dw_pw(const DwPwSumParams& p, cudaStream_t stream);

}  // namespace xsep::cuda
