// The operator xsep::cpu_peak: how fast this chip multiplies and adds in registers, what bench_cpu holds kernels
// against.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <chrono>
#include <numeric>
#include <vector>

#include "gemm.h"

namespace xsep::cpu {
namespace {

/// Chains enough for two units of four to five cycles' latency each.
constexpr int kChains = 12;

/// The value is made, in a register, wherever it goes. (A function, since Clang takes no variable from around a
/// lambda.)
XSEP_INLINE void keep(Vec& v) { __asm__ volatile("" : "+x"(v)); }

/// Multiply-adds a second of one thread for about the given time.
template <bool kPairs>
double rate(double seconds) {
  Vec sum[kChains] = {};
  const Vec factor = broadcast(0.999f);
  const Vec addend = broadcast(1e-6f);
  const auto start = std::chrono::steady_clock::now();
  double passed = 0;
  int64_t steps = 0;
  while (passed < seconds) {
    for (int i = 0; i < 4096; ++i) {
      XSEP_UNROLL
      for (int j = 0; j < kChains; ++j) {
        if constexpr (kPairs) {
#if defined(__AVX512F__)
          sum[j] = dot_pairs(sum[j], as_bits(factor), as_bits(addend));
#endif
        } else {
          sum[j] = fma(sum[j], factor, addend);
        }
        keep(sum[j]);
      }
    }
    steps += 4096;
    passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return static_cast<double>(steps) * kChains * kLanes * (kPairs ? 2 : 1) / passed;
}

/// FLOP/s of all threads together, two a multiply-add; of bfloat16 pairs 0 where there is no such instruction.
double peak(bool pairs, double seconds) {
  if (pairs && !kHasBFloat16Instructions) return 0;
  const int threads = at::get_num_threads();
  std::vector<double> rates(static_cast<size_t>(threads));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rates[static_cast<size_t>(i)] = pairs ? rate<true>(seconds) : rate<false>(seconds);
    }
  });
  return 2 * std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) { m.def("cpu_peak(bool pairs, float seconds) -> float", &peak); }

}  // namespace xsep::cpu
