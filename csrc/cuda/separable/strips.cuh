// z of a step in float32, whose products no tensor core makes exactly: each thread has strips of pixels.
#pragma once

#include "tile.cuh"
#include "window.cuh"

namespace xsep::cuda {

// z of one step, of chunks of CHUNK bytes, by threads.
template <class T, int K, int STRIDE, int CHUNK>
__device__ __forceinline__ void depthwise_chunk(const SeparableFpropParams& p, const FusedMemory& memory,
                                                const FusedStep& step, const unsigned char* halo, unsigned char* z) {
  constexpr int kBytes = kFusedVectorBytes, kVec = kBytes / static_cast<int>(sizeof(T)), kVectors = CHUNK / kBytes;
  static_assert(kBytes == 8, "a vector lies in one unit");
  const SeparablePlan& plan = p.plan;
  const int table = plan.table_channels, vector = static_cast<int>(threadIdx.x) % kVectors;
  const int strips_across = plan.strips;
  const int strips = memory.tile[step.map].rows * strips_across;
  const int first_channel = (step.chunk * kVectors + vector) * kVec;
  const float* taps = reinterpret_cast<const float*>(memory.taps.get()) + first_channel;
#pragma unroll 1
  for (int strip = static_cast<int>(threadIdx.x) / kVectors; strip < strips;
       strip += static_cast<int>(blockDim.x) / kVectors) {
    const int row = plan.by_strips.quotient(strip), column = (strip - row * strips_across) * kFusedStripWidth;
    const int corner = memory.slot[step.map * plan.tile_rows + row] * plan.halo_pitch + column * STRIDE;
    float sum[kFusedStripWidth][kVec] = {};
    slide_window<T, K, STRIDE>(sum, halo + corner * CHUNK + vector * kBytes, CHUNK, plan.halo_pitch * CHUNK, taps,
                               table);
    if (p.has_middle != 0) {
      const float* vectors = memory.vectors.get() + first_channel;
      const auto scale = Pack<float, kVec>::load(vectors + 2 * table);
      const auto shift = Pack<float, kVec>::load(vectors + 3 * table);
#pragma unroll
      for (int j = 0; j < kFusedStripWidth; ++j) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[j][v] = fmaf(scale.v[v], sum[j][v], shift.v[v]);
      }
      activate_groups(sum, {p.middle.activation, p.middle.alpha});
    }
    const int first = row * plan.tile_columns + column;
    unsigned char* out = z + vector * kBytes % 16;
#pragma unroll
    for (int j = 0; j < kFusedStripWidth; ++j) {
      if (column + j >= plan.tile_columns) break;
      Pack<T, kVec>::round(sum[j]).store(
          reinterpret_cast<T*>(out + swizzled_offset(first + j, vector * kBytes / 16, CHUNK)));
    }
  }
}

}  // namespace xsep::cuda
