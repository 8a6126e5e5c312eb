// What multiplies bfloat16 on this chip.
#pragma once

#include <ATen/core/Tensor.h>

namespace xsep::cpu {

enum class PairGemm {
  kNone,   // nothing: it is converted and multiplied as float32
  kDot,    // our own kernel, by AVX512_BF16's dot product of pairs
  kTiles,  // oneDNN's, by AMX
};

/// kNone for other types. oneDNN may be switched off between calls (torch.backends.mkldnn).
PairGemm pair_gemm(at::ScalarType dtype);

}  // namespace xsep::cpu
