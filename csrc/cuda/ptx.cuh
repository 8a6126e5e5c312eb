// The few PTX instructions the kernels use that CUDA C++ has no name for; sm_80 and up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace xsep::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// threadIdx.x, read anew: the compiler cannot tell that it is the same, and so keeps nothing that follows from it.
__device__ __forceinline__ unsigned thread_index_again() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// The same value, of which the compiler cannot tell where it comes from: it is kept in a register rather than made anew
// from its parts at each use.
template <class T>
__device__ __forceinline__ T kept(T value) {
  if constexpr (sizeof(T) == 8) {
    asm("" : "+l"(value));
  } else {
    asm("" : "+r"(value));
  }
  return value;
}

// Starts copying 16 bytes from global to shared memory, zeros where exists is 0 (then source is not read, but must be
// a valid address). Both 16-byte aligned. Bypasses L1: what is copied is read once a CTA.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, int exists) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      ".reg .b32 bytes;\n"
      "setp.ne.b32 exists, %2, 0;\n"
      "selp.b32 bytes, 16, 0, exists;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, bytes;\n"
      "}" ::"r"(shared_address(destination)),
      "l"(source), "r"(exists)
      : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the newest kGroupsLeft groups of this thread's own copies; others need a barrier besides.
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit). Lanes 8i to 8i+7 give the row addresses of matrix i, each
// 16 bytes and so aligned; lane l receives the 4 bytes number l % 4 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed on the way: lane l receives elements 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a 16x16 row-major a and a 16x8 column-major b, float32 accumulators; the last argument names the type.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b for a 16x8 row-major a, of which a thread has `above` in rows 0 to 7 and `below` in the others, and an 8x8
// column-major b.
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], uint32_t above, uint32_t below, uint32_t b, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(above), "r"(below), "r"(b));
}

__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], uint32_t above, uint32_t below, uint32_t b, __half) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(above), "r"(below), "r"(b));
}

// d += a b for a 16x8 row-major a and an 8x8 column-major b of tf32 values.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32 value, ties away from zero; mma would otherwise truncate.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// One store to global memory, aligned to its size: out of C++ the compiler makes several of it, where its words come in
// more ways than one. The kernel may not read it again: to the compiler it is no access of memory.
__device__ __forceinline__ void store_global(void* p, const uint32_t (&w)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3]));
}
__device__ __forceinline__ void store_global(void* p, const uint32_t (&w)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(w[0]), "r"(w[1]));
}
__device__ __forceinline__ void store_global(void* p, const uint32_t (&w)[1]) { *static_cast<uint32_t*>(p) = w[0]; }

// The larger and the smaller, in one instruction; NaN where either is NaN, as in PyTorch.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
}

// The larger of two 16-bit values in each half, NaN where either is NaN; the last argument names the type.
__device__ __forceinline__ uint32_t max_nan_pairs(uint32_t a, uint32_t b, __nv_bfloat16) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
__device__ __forceinline__ uint32_t max_nan_pairs(uint32_t a, uint32_t b, __half) {
  uint32_t larger;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// Of each half, whether its highest bit is set: all bits or none.
__device__ __forceinline__ uint32_t spread_signs(uint32_t halves) {
  uint32_t spread;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(spread) : "r"(halves));
  return spread;
}

}  // namespace xsep::cuda
