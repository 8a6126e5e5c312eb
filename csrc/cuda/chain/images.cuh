// What the chain's kernels over [pixels, C] share: where a thread stands, sums over a CTA, and the choice of a type.
#pragma once

#include "../channels.cuh"
#include "../launch.cuh"
#include "params.h"

namespace xsep::cuda {

// A thread's vector of channels, and which pixels are its own: first, first + step and so on.
template <int VEC>
struct ImageThread {
  int vector, lane;
  int c;        // its first channel
  bool active;  // the others only take part in barriers
  int64_t first, step;

  __device__ __forceinline__ ImageThread(const ImagePlan& plan, int channels)
      : vector(static_cast<int>(threadIdx.x) % plan.vectors),
        lane(static_cast<int>(threadIdx.x) / plan.vectors),
        c((static_cast<int>(blockIdx.y) * plan.vectors + vector) * VEC),
        active(lane < plan.lanes && c < channels),
        first(static_cast<int64_t>(blockIdx.x) * plan.lanes + lane),
        step(static_cast<int64_t>(gridDim.x) * plan.lanes) {}
};

// A float32 vector's values of a thread's channels.
template <int VEC>
__device__ __forceinline__ void read_channels(float (&out)[VEC], const float* values, int c) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) out[v] = values[c + v];
}

template <class T, int VEC>
__device__ __forceinline__ void read_channels(float (&out)[VEC], const ChannelVector& values, int c, float absent) {
#pragma unroll
  for (int v = 0; v < VEC; ++v) out[v] = channel_value<T>(values, c + v, absent);
}

// Adds ROWS rows of a thread's sums over the CTA's lanes, always in the order of the lanes, and hands each total to
// store(row, vector * VEC + v, total). scratch: [lanes, ROWS, vectors VEC]. Barriers before, between and after.
template <int VEC, int ROWS, class Store>
__device__ void sum_over_lanes(const float (&sum)[ROWS][VEC], const ImagePlan& plan, const ImageThread<VEC>& thread,
                               SharedBuffer<float> scratch, Store store) {
  const int width = plan.vectors * VEC;
  __syncthreads();
  if (thread.lane < plan.lanes) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) scratch[(thread.lane * ROWS + row) * width + thread.vector * VEC + v] = sum[row][v];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * width; i += static_cast<int>(blockDim.x)) {
    float total = 0.0f;
    for (int lane = 0; lane < plan.lanes; ++lane) total += scratch[lane * ROWS * width + i];
    store(i / width, i % width, total);
  }
  __syncthreads();
}

// Bytes of sum_over_lanes' scratch.
inline int lane_sums_bytes(const ImagePlan& plan, int rows) {
  return shared_bytes_of(plan.lanes * rows * plan.vectors * plan.vec * static_cast<int>(sizeof(float)));
}

inline LaunchShape image_launch(const ImagePlan& plan, int shared_bytes = 0) {
  return {dim3(static_cast<unsigned>(plan.workers), static_cast<unsigned>(plan.slices)), kImageThreads, shared_bytes};
}

template <class Type, int WIDTH>
struct Elements {
  using T = Type;
  static constexpr int kVec = WIDTH;
};

// Calls body(Elements<T, VEC>()) for the type and the width of a problem.
template <class Body>
void with_elements(DataType type, int vec, Body body) {
  switch (type) {
    case kFloat32:
      return vec == 1 ? body(Elements<float, 1>()) : body(Elements<float, 4>());
    case kFloat16:
      return vec == 1 ? body(Elements<__half, 1>()) : body(Elements<__half, 8>());
    case kBFloat16:
      return vec == 1 ? body(Elements<__nv_bfloat16, 1>()) : body(Elements<__nv_bfloat16, 8>());
  }
}

}  // namespace xsep::cuda
