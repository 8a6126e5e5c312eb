// Storage types and the float32 the kernels compute in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "device.cuh"

namespace xsep::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// As stored and read back.
template <class T>
__device__ __forceinline__ float round_to(float v) {
  return to_float(from_float<T>(v));
}

// VEC neighbouring channels, loaded and stored as one word.
template <class T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T v[VEC];
  static_assert(sizeof(T) * VEC <= 16, "one access moves at most 16 bytes");

  static __device__ __forceinline__ Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }

  static __device__ __forceinline__ Pack zero() {
    Pack pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.v[i] = from_float<T>(0.0f);
    return pack;
  }
  static __device__ __forceinline__ Pack round(const float (&f)[VEC]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.v[i] = from_float<T>(f[i]);
    return pack;
  }
  __device__ __forceinline__ void widen(float (&f)[VEC]) const {
#pragma unroll
    for (int i = 0; i < VEC; ++i) f[i] = to_float(v[i]);
  }
};

// VEC channels of an image of T, `at` elements from its first.
template <class T, int VEC>
__device__ __forceinline__ void read_pixel(float (&out)[VEC], const void* image, int64_t at) {
  Pack<T, VEC>::load(static_cast<const T*>(image) + at).widen(out);
}

template <class T, int VEC>
__device__ __forceinline__ void write_pixel(void* image, int64_t at, const float (&values)[VEC]) {
  Pack<T, VEC>::round(values).store(static_cast<T*>(image) + at);
}

}  // namespace xsep::cuda
