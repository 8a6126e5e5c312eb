// Per-channel vectors on their way to the threads that need them.
#pragma once

#include "activation.cuh"
#include "numeric.cuh"
#include "params.h"

namespace xsep::cuda {

template <class T>
__device__ __forceinline__ float channel_value(const ChannelVector& v, int64_t c, float absent) {
  if (v.data == nullptr) return absent;
  return v.is_float32 ? static_cast<const float*>(v.data)[c] : to_float(static_cast<const T*>(v.data)[c]);
}

// A table of float32 rows in shared memory, each with VEC values for each of `vectors` threads. The values of one
// thread lie 4 to a plane, so that the 16-byte reads of neighbouring threads fill the banks evenly. With MOST, a row
// has room for so many threads however many there are: then where a value lies is known at compile time.
template <int VEC, int MOST = 0>
class ChannelTable {
 public:
  static constexpr int kPlane = VEC < 4 ? VEC : 4;
  static_assert(VEC % kPlane == 0, "a thread's channels fill whole planes");

  __device__ explicit ChannelTable(SharedBuffer<float> memory, int vectors = MOST)
      : memory_(memory), vectors_(MOST > 0 ? MOST : vectors) {}

  static constexpr __host__ __device__ int size(int rows, int vectors) { return rows * vectors * VEC; }

  __device__ float& at(int row, int channel) const {
    const int vector = channel / VEC, i = channel % VEC;
    return memory_[((row * (VEC / kPlane) + i / kPlane) * count() + vector) * kPlane + i % kPlane];
  }

  __device__ __forceinline__ void read(float (&out)[VEC], int row, int vector) const {
#pragma unroll
    for (int plane = 0; plane < VEC / kPlane; ++plane) {
      const float* source = memory_.get() + ((row * (VEC / kPlane) + plane) * count() + vector) * kPlane;
      const auto pack = Pack<float, kPlane>::load(source);
#pragma unroll
      for (int i = 0; i < kPlane; ++i) out[plane * kPlane + i] = pack.v[i];
    }
  }

  __device__ __forceinline__ void write(int row, int vector, const float (&values)[VEC]) const {
#pragma unroll
    for (int plane = 0; plane < VEC / kPlane; ++plane) {
      Pack<float, kPlane> pack;
#pragma unroll
      for (int i = 0; i < kPlane; ++i) pack.v[i] = values[plane * kPlane + i];
      pack.store(memory_.get() + ((row * (VEC / kPlane) + plane) * count() + vector) * kPlane);
    }
  }

 private:
  __device__ __forceinline__ int count() const { return MOST > 0 ? MOST : vectors_; }

  SharedBuffer<float> memory_;
  int vectors_;
};

// Loads the weights of channels [first, first + vectors * VEC) into rows 0 to taps - 1; zeros past the last channel.
template <class T, int VEC, int MOST>
__device__ void load_weights(const ChannelTable<VEC, MOST>& table, const void* w_dw, int taps, int first, int channels,
                             int vectors) {
  const T* weights = static_cast<const T*>(w_dw);  // [C_mid, R S]
  for (int i = static_cast<int>(threadIdx.x); i < vectors * VEC * taps; i += static_cast<int>(blockDim.x)) {
    const int c = i / taps, tap = i % taps;
    const bool inside = first + c < channels;
    table.at(tap, c) = inside ? to_float(weights[static_cast<int64_t>(first + c) * taps + tap]) : 0.0f;
  }
}

template <class T, int VEC, int MOST>
__device__ void load_channel_vector(const ChannelTable<VEC, MOST>& table, int row, const ChannelVector& v, float absent,
                                    int first, int channels, int vectors) {
  for (int c = static_cast<int>(threadIdx.x); c < vectors * VEC; c += static_cast<int>(blockDim.x)) {
    table.at(row, c) = first + c < channels ? channel_value<T>(v, first + c, absent) : absent;
  }
}

}  // namespace xsep::cuda
