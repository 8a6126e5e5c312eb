// Packing, and the operators xsep::cpu_pack_pointwise and xsep::cpu_checksum, by which inference keeps packed weights.
#include "packed_pointwise.h"

#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "pair_gemm.h"

namespace xsep::cpu {

PointwisePacking pointwise_packing(const Tensor& w_pw, int64_t multiplier) {
  const bool pairs = pair_gemm(w_pw.scalar_type()) != PairGemm::kNone;
  const int64_t c_mid = w_pw.size(1);
  return {w_pw.size(0), c_mid / multiplier, multiplier, pairs ? round_up(c_mid, 2) : c_mid, pairs};
}

bool is_packed(const OptionalTensor& packed, const PointwisePacking& packing) {
  return packed && packed->is_contiguous() && packed->dim() == 2 &&
         packed->scalar_type() == (packing.pairs ? at::kBFloat16 : at::kFloat) &&
         packed->size(0) == ceil_div(packing.c_out, kPanelColumns) && packed->size(1) == packing.depth * kPanelColumns;
}

void pack_one_panel(const Tensor& w, const PointwisePacking& packing, int64_t panel, void* out) {
  const void* from = w.const_data_ptr();
  if (packing.pairs && packing.multiplier == 1 && packing.c % 2 == 0) {
    // A pair is adjacent in w_pw too and moves as one 32-bit value: the float panel of half the depth.
    const PointwisePacking halved{packing.c_out, packing.c / 2, 1, packing.depth / 2, false};
    return pack_panel(halved, static_cast<const float*>(from), panel, static_cast<float*>(out));
  }
  if (packing.pairs) return pack_panel(packing, static_cast<const BFloat16*>(from), panel, static_cast<BFloat16*>(out));
  with_storage(w.scalar_type(), [&](auto t) {
    pack_panel(packing, static_cast<const decltype(t)*>(from), panel, static_cast<float*>(out));
  });
}

Tensor packed_pointwise(const Tensor& w_pw, const PointwisePacking& packing) {
  const Tensor w = w_pw.contiguous();
  const int64_t panels = ceil_div(packing.c_out, kPanelColumns);
  const int64_t panel_size = packing.depth * kPanelColumns;
  const Tensor packed = empty({panels, panel_size}, w.options().dtype(packing.pairs ? at::kBFloat16 : at::kFloat));
  const int64_t panel_bytes = panel_size * packed.element_size();
  char* out = static_cast<char*>(packed.mutable_data_ptr());
  at::parallel_for(0, panels, std::max<int64_t>(32768 / panel_size, 1), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) pack_one_panel(w, packing, panel, out + panel * panel_bytes);
  });
  return packed;
}

namespace {

Tensor pack_pointwise(const Tensor& w_pw, int64_t multiplier) {
  check_input(w_pw, w_pw.scalar_type(), 4, "w_pw");
  TORCH_CHECK(w_pw.size(0) > 0 && w_pw.size(1) > 0 && w_pw.size(2) == 1 && w_pw.size(3) == 1 && multiplier > 0 &&
                  w_pw.size(1) % multiplier == 0,
              "w_pw must be [C_out, C_in * multiplier, 1, 1], but is ", w_pw.sizes(), " with a multiplier of ",
              multiplier);
  return packed_pointwise(w_pw, pointwise_packing(w_pw, multiplier));
}

/// Of one block: lanes of sums h = rotated(h ^ word) * odd. Each step loses nothing, so a change of one word always
/// shows; the rotation keeps equal changes of many words, as where all are negated or doubled, from cancelling out.
uint64_t block_checksum(const char* data, int64_t bytes) {
  constexpr int kStreams = 4;
  constexpr int64_t kStep = kStreams * kVecBytes;
  const VecBits odd = broadcast_bits(0x9e3779b1u);
  VecBits sums[kStreams] = {};
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep) {
    XSEP_UNROLL
    for (int i = 0; i < kStreams; ++i) {
      VecBits words;
      std::memcpy(&words, data + at + i * kVecBytes, kVecBytes);
      const VecBits mixed = sums[i] ^ words;
      sums[i] = ((mixed << 13) | (mixed >> 19)) * odd;
    }
  }
  uint64_t sum = static_cast<uint64_t>(bytes);
  const auto add = [&sum](uint64_t word) { sum = (sum ^ word) * 0x9e3779b97f4a7c15u; };
  for (const VecBits& stream : sums) {
    for (int i = 0; i < kLanes; ++i) add(stream[i]);
  }
  for (; at < bytes; ++at) add(static_cast<unsigned char>(data[at]));
  return sum;
}

/// Of a tensor's values, whatever the number of threads.
int64_t checksum(const Tensor& t) {
  constexpr int64_t kBlock = 256 * 1024;
  const Tensor dense = t.contiguous();
  const char* data = static_cast<const char*>(dense.const_data_ptr());
  const int64_t bytes = dense.numel() * dense.element_size();
  std::vector<uint64_t> sums(static_cast<size_t>(ceil_div(bytes, kBlock)));
  at::parallel_for(0, ceil_div(bytes, kBlock), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      sums[static_cast<size_t>(i)] = block_checksum(data + i * kBlock, std::min(kBlock, bytes - i * kBlock));
    }
  });
  const auto join = [](uint64_t a, uint64_t b) { return (a ^ b) * 0x9e3779b97f4a7c15u + 1; };
  return static_cast<int64_t>(std::accumulate(sums.begin(), sums.end(), uint64_t{0}, join));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def("cpu_pack_pointwise(Tensor w_pw, int multiplier) -> Tensor");
  m.def("cpu_checksum(Tensor t) -> int");
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) {
  m.impl("cpu_pack_pointwise", &pack_pointwise);
  m.impl("cpu_checksum", &checksum);
}

}  // namespace xsep::cpu
