// SIMD on the compiler's vector extensions: one source, as wide as the level it is compiled for.
//
// Storage types are float, BFloat16 and Half; arithmetic is always float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define XSEP_INLINE inline __attribute__((always_inline))
/// Of a kernel whose speed hangs on its registers: who calls it, and from where, does not change how it is compiled.
#define XSEP_NOINLINE __attribute__((noinline))
/// Before a loop over registers, which have no index: one that is not unrolled would go through memory. Where each
/// round reads a stride further, a pointer goes along: of an index times the stride GCC would keep a register a round.
#define XSEP_UNROLL _Pragma("GCC unroll 64")

namespace xsep::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

/// Vectors in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
/// Floats in a vector.
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(float));
/// Per-channel float arrays are padded to a multiple of this, so that they are read in whole vectors at every level.
constexpr int64_t kChannelPad = 16;
static_assert(kChannelPad % kLanes == 0);

/// From row to row of a table of 32-bit values for each channel, one row a tap of the filter. A distance of many powers
/// of two would put a channel's taps into few sets of the first-level cache: at 1024 channels all of them into one.
constexpr int64_t table_row(int64_t channels) {
  constexpr int64_t kBadDistance = 512 / 4;
  const int64_t row = (channels + kChannelPad - 1) / kChannelPad * kChannelPad;
  return row % kBadDistance == 0 ? row + kChannelPad : row;
}

typedef float Vec __attribute__((vector_size(kVecBytes)));
typedef int32_t VecInt __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecBits __attribute__((vector_size(kVecBytes)));
typedef uint16_t Vec16 __attribute__((vector_size(kVecBytes / 2)));
typedef float VecUnaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
typedef uint16_t Vec16Unaligned __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));

/// Zeros, vector by vector: of an array with an initialiser GCC makes a loop of stores to memory.
template <int N>
XSEP_INLINE void set_zero(Vec (&v)[N]) {
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) v[i] = Vec{};
}
template <int M, int N>
XSEP_INLINE void set_zero(Vec (&v)[M][N]) {
  XSEP_UNROLL
  for (int i = 0; i < M; ++i) set_zero(v[i]);
}

XSEP_INLINE Vec broadcast(float v) { return v - Vec{}; }
XSEP_INLINE VecBits broadcast_bits(uint32_t v) { return v - VecBits{}; }
XSEP_INLINE VecBits as_bits(Vec v) { return reinterpret_cast<VecBits>(v); }
XSEP_INLINE Vec as_float(VecBits v) { return reinterpret_cast<Vec>(v); }

/// a * b + c, in one rounding where the level has FMA and the compiler sees the two together.
XSEP_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
/// The same in one rounding wherever the level has FMA, for values whose sign decides: of a product that two branches
/// share, GCC makes one before them, and rounds it.
XSEP_INLINE Vec fma_for_certain(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__) && defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec>(
      vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else
  return fma(a, b, c);
#endif
}
/// v, which is used several times, in a register: GCC would read it from memory for each use, and the first-level cache
/// gives some chips with AVX-512 no more than a vector a clock.
XSEP_INLINE Vec in_register(Vec v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#endif
  return v;
}
/// The larger, the smaller of bound and v; v where v is NaN.
XSEP_INLINE Vec at_least(Vec v, Vec bound) { return bound > v ? bound : v; }
XSEP_INLINE Vec at_most(Vec v, Vec bound) { return bound < v ? bound : v; }

XSEP_INLINE Vec bfloat16_to_float(Vec16 v) { return as_float(__builtin_convertvector(v, VecBits) << 16); }

#if defined(__AVX512F__)
/// Whether the chip has AVX512_BF16. Its instructions are written by name, so that the level needs no further flag.
inline const bool kHasBFloat16Instructions = __builtin_cpu_supports("avx512bf16");
#else
constexpr bool kHasBFloat16Instructions = false;
#endif

/// Round to nearest even; NaN stays NaN. AVX512_BF16 makes zeros of subnormals, as it does in oneDNN's convolution.
XSEP_INLINE Vec16 float_to_bfloat16(Vec v) {
#if defined(__AVX512F__)
  if (kHasBFloat16Instructions) {
    Vec16 rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
    return rounded;
  }
#endif
  const VecBits bits = as_bits(v);
  const VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecBits quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet, Vec16);
}

#if defined(__AVX512F__)
// The zeroing forms with a full mask compile to the plain ones; those would read "undefined" registers, about which
// GCC 12 warns.
XSEP_INLINE Vec half_to_float(Vec16 v) {
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(v)));
}
XSEP_INLINE Vec16 float_to_half(Vec v) {
  return reinterpret_cast<Vec16>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__) && defined(__AVX2__)
XSEP_INLINE Vec half_to_float(Vec16 v) { return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v))); }
XSEP_INLINE Vec16 float_to_half(Vec v) {
  return reinterpret_cast<Vec16>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
XSEP_INLINE Vec half_to_float(Vec16 v) { return reinterpret_cast<Vec>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(v))); }
XSEP_INLINE Vec16 float_to_half(Vec v) {
  return reinterpret_cast<Vec16>(vcvt_f16_f32(reinterpret_cast<float32x4_t>(v)));
}
#else
/// By integer arithmetic on the exponent; subnormals become exact through one subtraction in float.
XSEP_INLINE Vec half_to_float(Vec16 v) {
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  constexpr uint32_t kSmallestNormal = 1u << 23;  // half's, shifted into float's place
  constexpr uint32_t kInfinity = 31u << 23;
  const VecBits wide = __builtin_convertvector(v, VecBits);
  const VecBits magnitude = (wide & 0x7fffu) << 13;
  const VecBits normal = magnitude + kRebias;
  const VecBits special = magnitude + 2 * kRebias;
  const Vec one_above = as_float(magnitude + (kRebias + kSmallestNormal));
  const VecBits subnormal = as_bits(one_above - as_float(broadcast_bits(kRebias + kSmallestNormal)));
  const VecBits finite = magnitude < kSmallestNormal ? subnormal : normal;
  return as_float((magnitude >= kInfinity ? special : finite) | ((wide & 0x8000u) << 16));
}

/// Round to nearest even; NaN stays NaN, what is beyond half's range becomes infinity.
XSEP_INLINE Vec16 float_to_half(Vec v) {
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  constexpr uint32_t kTooLarge = (127u + 16u) << 23;
  constexpr uint32_t kSmallestNormal = (127u - 14u) << 23;
  constexpr uint32_t kHalfUnit = (127u - 1u) << 23;  // 0.5: its last bit is half's smallest subnormal
  const VecBits bits = as_bits(v);
  const VecBits magnitude = bits & 0x7fffffffu;
  const VecBits normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const VecBits subnormal = as_bits(as_float(magnitude) + as_float(broadcast_bits(kHalfUnit))) - kHalfUnit;
  const VecBits special = magnitude > 0x7f800000u ? broadcast_bits(0x7e00u) : broadcast_bits(0x7c00u);
  const VecBits finite = magnitude < kSmallestNormal ? subnormal : normal;
  return __builtin_convertvector((magnitude >= kTooLarge ? special : finite) | ((bits >> 16) & 0x8000u), Vec16);
}
#endif

#if defined(__AVX512F__)
/// sum + a.low * b.low + a.high * b.high in each lane; where kHasBFloat16Instructions.
XSEP_INLINE Vec dot_pairs(Vec sum, VecBits a, VecBits b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

/// Whether so many lanes of a vector must be told from all of them. With masks that costs less than to ask; else all of
/// them is by far the most common, which GCC would take to be the exception.
XSEP_INLINE bool incomplete(int64_t lanes) {
#if defined(__AVX512VL__)
  return !(__builtin_constant_p(lanes) && lanes == kLanes);
#else
  return __builtin_expect(lanes < kLanes, false);
#endif
}

XSEP_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
/// load, which the compiler does not do once for several uses: it costs no register meanwhile.
XSEP_INLINE Vec load_for_this_use(const float* p) {
  __asm__("" : "+r"(p));
  return load(p);
}
#if defined(__AVX512BW__)
/// Where each 16-bit half of 16 floats comes from: the high ones from BFloat16, the low ones (masked out) from nowhere.
alignas(64) inline constexpr uint16_t kHighHalves[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                         0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
/// One instruction beside the load, where widening and shifting are two.
XSEP_INLINE Vec halves_to_float(__m256i v) {
  const __m512i halves = _mm512_castsi256_si512(v);
  return reinterpret_cast<Vec>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(kHighHalves), halves));
}
XSEP_INLINE Vec load(const BFloat16* p) {
  return halves_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#else
XSEP_INLINE Vec load(const BFloat16* p) { return bfloat16_to_float(*reinterpret_cast<const Vec16Unaligned*>(p)); }
#endif
XSEP_INLINE Vec load(const Half* p) { return half_to_float(*reinterpret_cast<const Vec16Unaligned*>(p)); }
XSEP_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
XSEP_INLINE void store(BFloat16* p, Vec v) { *reinterpret_cast<Vec16Unaligned*>(p) = float_to_bfloat16(v); }
XSEP_INLINE void store(Half* p, Vec v) { *reinterpret_cast<Vec16Unaligned*>(p) = float_to_half(v); }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
XSEP_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

XSEP_INLINE Vec16 load_first_16(const void* p, int64_t n) {
  return reinterpret_cast<Vec16>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
XSEP_INLINE void store_first_16(void* p, Vec16 v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), reinterpret_cast<__m256i>(v));
}

/// The first n lanes, 1 <= n <= kLanes, zero in the others; memory beyond them is not touched.
XSEP_INLINE Vec load_first(const float* p, int64_t n) {
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(first_lanes(n), p));
}
XSEP_INLINE void store_first(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), reinterpret_cast<__m512>(v));
}
#else
template <class Wide, class Element>
XSEP_INLINE Wide load_elements(const Element* p, int64_t n) {
  Element lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  Wide v;
  std::memcpy(&v, lanes, sizeof(v));
  return v;
}
template <class Wide, class Element>
XSEP_INLINE void store_elements(Element* p, Wide v, int64_t n) {
  Element lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/// 16-bit elements of p from `first` on, as many as T holds.
template <class T>
XSEP_INLINE uint64_t elements_from(const void* p, int64_t first) {
  T v;
  std::memcpy(&v, static_cast<const uint16_t*>(p) + first, sizeof(v));
  return v;
}
template <class T>
XSEP_INLINE void put_elements(void* p, int64_t first, uint64_t v) {
  const T some = static_cast<T>(v);
  std::memcpy(static_cast<uint16_t*>(p) + first, &some, sizeof(some));
}
/// Whole vectors are by far the most common. Parts come in two pieces that may overlap, for one by one they would go
/// through memory, and the vector would wait for it.
XSEP_INLINE Vec16 load_first_16(const void* p, int64_t n) {
  if (!incomplete(n)) return *static_cast<const Vec16Unaligned*>(p);
  uint64_t low, high = 0;
  if (n >= 4) {
    low = elements_from<uint64_t>(p, 0);
    if (n > 4) high = elements_from<uint64_t>(p, n - 4) >> 16 * (8 - n);
  } else if (n >= 2) {
    low = elements_from<uint32_t>(p, 0) | elements_from<uint16_t>(p, n - 1) << 16 * (n - 1);
  } else {
    low = elements_from<uint16_t>(p, 0);
  }
  return reinterpret_cast<Vec16>(_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)));
}
XSEP_INLINE void store_first_16(void* p, Vec16 v, int64_t n) {
  if (!incomplete(n)) {
    *static_cast<Vec16Unaligned*>(p) = v;
    return;
  }
  uint64_t part = static_cast<uint64_t>(_mm_cvtsi128_si64(reinterpret_cast<__m128i>(v)));
  int64_t done = 0;
  if (n & 4) {
    put_elements<uint64_t>(p, 0, part);
    part = static_cast<uint64_t>(_mm_extract_epi64(reinterpret_cast<__m128i>(v), 1));
    done = 4;
  }
  if (n & 2) {
    put_elements<uint32_t>(p, done, part);
    part >>= 32;
    done += 2;
  }
  if (n & 1) put_elements<uint16_t>(p, done, part);
}
#else
XSEP_INLINE Vec16 load_first_16(const void* p, int64_t n) {
  if (incomplete(n)) return load_elements<Vec16>(static_cast<const uint16_t*>(p), n);
  return *static_cast<const Vec16Unaligned*>(p);
}
XSEP_INLINE void store_first_16(void* p, Vec16 v, int64_t n) {
  if (incomplete(n)) {
    store_elements(static_cast<uint16_t*>(p), v, n);
  } else {
    *static_cast<Vec16Unaligned*>(p) = v;
  }
}
#endif

/// The first n lanes, 1 <= n <= kLanes, zero in the others; memory beyond them is not touched.
#if defined(__AVX2__) && !defined(__AVX512F__)
XSEP_INLINE Vec load_first(const float* p, int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
}
/// In parts: chips of AMD take long over a store with a mask.
XSEP_INLINE void store_first(float* p, Vec v, int64_t n) {
  if (!incomplete(n)) return store(p, v);
  __m128 part = _mm256_castps256_ps128(v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
#else
XSEP_INLINE Vec load_first(const float* p, int64_t n) { return incomplete(n) ? load_elements<Vec>(p, n) : load(p); }
XSEP_INLINE void store_first(float* p, Vec v, int64_t n) {
  if (incomplete(n)) {
    store_elements(p, v, n);
  } else {
    store(p, v);
  }
}
#endif
#endif

#if defined(__AVX512BW__)
XSEP_INLINE Vec load_first(const BFloat16* p, int64_t n) {
  return halves_to_float(reinterpret_cast<__m256i>(load_first_16(p, n)));
}
#else
XSEP_INLINE Vec load_first(const BFloat16* p, int64_t n) { return bfloat16_to_float(load_first_16(p, n)); }
#endif
XSEP_INLINE Vec load_first(const Half* p, int64_t n) { return half_to_float(load_first_16(p, n)); }
XSEP_INLINE void store_first(BFloat16* p, Vec v, int64_t n) { store_first_16(p, float_to_bfloat16(v), n); }
XSEP_INLINE void store_first(Half* p, Vec v, int64_t n) { store_first_16(p, float_to_half(v), n); }

/// count values next to each other, from and to storage.
template <class T>
void to_floats(const T* from, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    store_first(out + i, load_first(from + i, lanes), lanes);
  }
}
template <class T>
void from_floats(const float* from, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    store_first(out + i, load_first(from + i, lanes), lanes);
  }
}

/// Brings N pieces of memory, `step` bytes apart, towards the second-level cache, to be read or written a row of the
/// picture later: the hardware follows a few streams of lines, not one for each pixel of a block. They may lie outside
/// of the tensor, which does no harm.
template <int N>
XSEP_INLINE void prefetch_pieces(uintptr_t at, uintptr_t step) {
  XSEP_UNROLL
  for (int i = 0; i < N; ++i) __builtin_prefetch(reinterpret_cast<const void*>(at + i * step), 0, 2);
}

constexpr int64_t kLineBytes = 64;

/// N pixels' channels [c, c + kLanes), once a line.
template <int N, class T>
XSEP_INLINE void prefetch_pixels(const T* from, int64_t offset, int64_t pixel_step, int64_t c) {
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(T));
  if (kLine > kLanes && c % kLine != 0) return;
  prefetch_pieces<N>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(offset + c) * sizeof(T),
                     static_cast<uintptr_t>(pixel_step) * sizeof(T));
}

/// One value to and from storage.
template <class T>
XSEP_INLINE float to_float(T v) {
  return load_first(&v, 1)[0];
}
template <class T>
XSEP_INLINE T from_float(float v) {
  T out;
  store_first(&out, broadcast(v), 1);
  return out;
}

}  // namespace xsep::cpu
