// What the wrappers of csrc/cuda/ptx.cuh mean, in plain C++: same names, same fragment layouts (PTX ISA, "Matrix
// fragments for mma.m16n8k16" and ".m16n8k8", "ldmatrix").
#pragma once

#include "emulator.h"

namespace xsep::cuda {

inline unsigned thread_index_again() { return threadIdx.x; }

template <class T>
T kept(T value) {
  return value;
}

inline void cp_async_16(void* destination, const void* source, int exists) {
  emulator::copy_async(destination, source, 16, exists != 0);
}
inline void cp_async_commit() { emulator::copy_async_commit(); }
template <int kGroupsLeft>
void cp_async_wait() {
  emulator::copy_async_wait(kGroupsLeft);
}

// Lanes 8i to 8i+7 hold the row addresses of matrix i; lane l receives elements 2(l%4), 2(l%4)+1 of row l/4.
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  const auto rows = emulator::gather("ldmatrix", row);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const auto* source = static_cast<const std::byte*>(rows[i * 8 + lane / 4]);
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) emulator::fail("ldmatrix row not aligned to 16 bytes");
    emulator::check_shared(source, 16, "ldmatrix");
    std::memcpy(&out[i], source + lane % 4 * 4, 4);
  }
}

// Lane l receives element l/4 of rows 2(l%4) and 2(l%4)+1.
inline void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row) {
  const auto rows = emulator::gather("ldmatrix.trans", row);
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const auto* source = static_cast<const std::byte*>(rows[i * 8 + lane % 4 * 2 + k]);
      if (reinterpret_cast<uintptr_t>(source) % 16 != 0) emulator::fail("ldmatrix row not aligned to 16 bytes");
      emulator::check_shared(source, 16, "ldmatrix");
      std::memcpy(&pair[k], source + lane / 4 * 2, 2);
    }
    out[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

namespace host {

template <class T>
float element(uint32_t pair, int index) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * index));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return static_cast<float>(value);
}

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
void mma_16816(const char* name, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = emulator::gather(name, mine);
  const int group = emulator::lane() / 4, quad = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i / 2) * 8, column = quad * 2 + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int register_a = (row / 8) + (k / 8) * 2;
      const float va = element<T>(all[row % 8 * 4 + k % 8 / 2].a[register_a], k % 2);
      const float vb = element<T>(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      sum += va * vb;
    }
    d[i] = sum;
  }
}

template <class T>
void mma_1688(const char* name, float (&d)[4], uint32_t above, uint32_t below, uint32_t b) {
  const auto all = emulator::gather(name, Operands{{above, below}, {b}});
  const int group = emulator::lane() / 4, quad = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = quad * 2 + i % 2;
    float sum = d[i];
    for (int k = 0; k < 8; ++k) {
      sum += element<T>(all[group * 4 + k / 2].a[i / 2], k % 2) * element<T>(all[column * 4 + k / 2].b[0], k % 2);
    }
    d[i] = sum;
  }
}

template <class T>
uint32_t max_nan_pairs(uint32_t a, uint32_t b) {
  uint32_t larger = 0;
  for (int i = 0; i < 2; ++i) {
    const float left = element<T>(a, i), right = element<T>(b, i);
    const bool first = left > right || (left == right && !std::signbit(left));  // +0 is larger than -0
    const uint32_t taken = std::isnan(left) || std::isnan(right) ? 0x7fff7fff : (first ? a : b);
    larger |= taken & 0xffffu << (16 * i);
  }
  return larger;
}

inline float round_to_tf32(uint32_t bits) {
  bits &= 0xffffe000u;  // the tensor core ignores the low 13 bits
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace host

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  host::mma_16816<__nv_bfloat16>("mma.m16n8k16.bf16", d, a, b);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  host::mma_16816<__half>("mma.m16n8k16.f16", d, a, b);
}

inline void mma_m16n8k8(float (&d)[4], uint32_t above, uint32_t below, uint32_t b, __nv_bfloat16) {
  host::mma_1688<__nv_bfloat16>("mma.m16n8k8.bf16", d, above, below, b);
}
inline void mma_m16n8k8(float (&d)[4], uint32_t above, uint32_t below, uint32_t b, __half) {
  host::mma_1688<__half>("mma.m16n8k8.f16", d, above, below, b);
}

inline uint32_t max_nan_pairs(uint32_t a, uint32_t b, __nv_bfloat16) {
  return host::max_nan_pairs<__nv_bfloat16>(a, b);
}
inline uint32_t max_nan_pairs(uint32_t a, uint32_t b, __half) { return host::max_nan_pairs<__half>(a, b); }

inline uint32_t spread_signs(uint32_t halves) {
  return (halves >> 31) * 0xffff0000u | (halves >> 15 & 1) * 0x0000ffffu;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = emulator::gather("mma.m16n8k8.tf32", mine);
  const int group = emulator::lane() / 4, quad = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i / 2) * 8, column = quad * 2 + i % 2;
    float sum = d[i];
    for (int k = 0; k < 8; ++k) {
      const float va = host::round_to_tf32(all[row % 8 * 4 + k % 4].a[(row / 8) + (k / 4) * 2]);
      const float vb = host::round_to_tf32(all[column * 4 + k % 4].b[k / 4]);
      sum += va * vb;
    }
    d[i] = sum;
  }
}

inline uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;  // nearest, ties away, as cvt.rna
  return bits & 0xffffe000u;
}

template <size_t kWords>
void store_global(void* p, const uint32_t (&w)[kWords]) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(w) != 0) emulator::fail("a store to an address not aligned to its size");
  std::memcpy(p, w, sizeof(w));
}

inline float max_nan(float a, float b) { return std::isnan(a) ? a : (b < a ? a : b); }
inline float min_nan(float a, float b) { return std::isnan(a) ? a : (a < b ? a : b); }

}  // namespace xsep::cuda
