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

// Two 16-bit values in one word, the first in its lower half: fewer instructions than one by one. The last argument
// names the type.
__device__ __forceinline__ void widen_pair(float (&f)[2], uint32_t bits, __nv_bfloat16) {
  f[0] = __uint_as_float(bits << 16);
  f[1] = __uint_as_float(bits & 0xffff0000u);
}
__device__ __forceinline__ void widen_pair(float (&f)[2], uint32_t bits, __half) {
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
  const float2 both = __half22float2(pair);
  f[0] = both.x, f[1] = both.y;
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t round_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// VEC neighbouring channels, loaded and stored as one word.
template <class T, int VEC, bool PAIRS = sizeof(T) == 2 && VEC % 2 == 0>
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
  // The larger of each and 0; a NaN stays one.
  __device__ __forceinline__ void relu() {
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = from_float<T>(max_nan(to_float(v[i]), 0.0f));
  }
};

// 16-bit channels are kept two to a register: kept one by one, the compiler takes them apart and puts them together
// again wherever a pack goes one way or another.
template <class T, int VEC>
struct alignas(sizeof(T) * VEC) Pack<T, VEC, true> {
  uint32_t pair[VEC / 2];
  static_assert(sizeof(T) * VEC <= 16, "one access moves at most 16 bytes");

  static __device__ __forceinline__ Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Pack*>(p) = *this; }

  static __device__ __forceinline__ Pack zero() {
    Pack pack;
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) pack.pair[i] = 0;
    return pack;
  }
  static __device__ __forceinline__ Pack round(const float (&f)[VEC]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) pack.pair[i] = round_pair(f[2 * i], f[2 * i + 1], T());
    return pack;
  }
  __device__ __forceinline__ void widen(float (&f)[VEC]) const {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      float both[2];
      widen_pair(both, pair[i], T());
      f[2 * i] = both[0], f[2 * i + 1] = both[1];
    }
  }
  __device__ __forceinline__ void relu() {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) pair[i] = max_nan_pairs(pair[i], 0, T());
  }
  // Zero where `activated`, of which relu() was taken, is zero: what has no sign is not zero where 0x7fff carries into
  // the place of the sign.
  __device__ __forceinline__ void clear_where_zero(const Pack& activated) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) pair[i] &= spread_signs(activated.pair[i] + 0x7fff7fffu);
  }
};

// As stored and read back.
template <class T, int VEC>
__device__ __forceinline__ void round_to(float (&v)[VEC]) {
  Pack<T, VEC>::round(v).widen(v);
}

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
