// What the instructions of translated PTX mean (tests/cuda/ptx.py), for those that are no operator of C++. Registers
// are bits; a 32-bit address of shared memory begins at kShared, where the CTA's dynamic memory lies.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <utility>

#include "host_ptx.h"

namespace machine {

inline constexpr uint64_t kShared = 1024;

// As many bits, as a number.
template <class T>
using Bits = std::conditional_t<
    sizeof(T) == 1, uint8_t,
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

template <class T>
inline constexpr bool kIsFloat = !std::is_integral_v<T>;

template <class T, class U>
T bits_as(U value) {
  static_assert(sizeof(T) == sizeof(U));
  T out;
  std::memcpy(static_cast<void*>(&out), static_cast<const void*>(&value), sizeof(T));
  return out;
}

// A register's contents as T: its low bits where T is narrower.
template <class T, class Register>
T as(Register value) {
  if constexpr (std::is_same_v<T, bool> || std::is_same_v<Register, bool>) {
    return static_cast<T>(value);
  } else if constexpr (!std::is_integral_v<Register>) {
    return bits_as<T>(value);
  } else {
    return bits_as<T>(static_cast<Bits<T>>(value));
  }
}

// A T into a register, which may be wider: a signed number keeps its sign.
template <class Register, class T>
Register to(T value) {
  if constexpr (std::is_floating_point_v<Register>) {
    return bits_as<Register>(value);
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<Register>(value);
  } else {
    return static_cast<Register>(bits_as<Bits<T>>(value));
  }
}

// What a register holds that nothing was written to.
template <class T>
constexpr T poison() {
  if constexpr (std::is_floating_point_v<T>) {
    return std::numeric_limits<T>::quiet_NaN();
  } else {
    return static_cast<T>(0xdeadbeefdeadbeefull);
  }
}

template <class Part, int i, class Whole>
Part piece(Whole whole) {
  return static_cast<Part>(whole >> (i * 8 * sizeof(Part)));
}

template <class Whole, class Part>
Whole joined(std::initializer_list<Part> parts) {
  Whole whole = 0;
  int i = 0;
  for (Part part : parts) whole |= static_cast<Whole>(part) << (i++ * 8 * static_cast<int>(sizeof(Part)));
  return whole;
}

template <class T>
bool is_nan(T value) {
  return std::isnan(static_cast<double>(value));
}

// Numbers of 16 bits are reckoned in double and rounded once.
template <class T>
using Wide = std::conditional_t<kIsFloat<T> && sizeof(T) == 2, double, std::conditional_t<kIsFloat<T>, T, Bits<T>>>;

template <class T, class From>
T rounded(From value) {
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (std::is_same_v<From, float>) return __float2half_rn(value);
    return __double2half(static_cast<double>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (std::is_same_v<From, float>) return __float2bfloat16_rn(value);
    return __double2bfloat16(static_cast<double>(value));
  } else if constexpr (std::is_same_v<From, __half> || std::is_same_v<From, __nv_bfloat16>) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class T>
Wide<T> wide(T value) {
  return rounded<Wide<T>>(value);
}

// Integers wrap around.
template <class T>
T sum(T a, T b) {
  return rounded<T>(wide(a) + wide(b));
}
template <class T>
T difference(T a, T b) {
  return rounded<T>(wide(a) - wide(b));
}
template <class T>
T product(T a, T b) {
  if constexpr (kIsFloat<T>) {
    return rounded<T>(wide(a) * wide(b));
  } else {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
}
template <class T>
T high_product(T a, T b) {
  using Twice = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Twice>(a) * static_cast<Twice>(b) >> (8 * sizeof(T)));
}
template <class T>
T fused(T a, T b, T c) {
  return rounded<T>(std::fma(wide(a), wide(b), wide(c)));
}

// Rounded towards minus infinity. The product is exact in double, and what the sum loses there is known.
inline float fma_down(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
  const double of_addend = sum - product, lost = (product - (sum - of_addend)) + (addend - of_addend);
  const auto near = static_cast<float>(sum);
  const double above = static_cast<double>(near) - sum;
  return above > 0 || (above == 0 && lost < 0) ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}

template <class T>
T quotient(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    if (b == 0) emulator::fail("an integer divided by zero");
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return difference<T>(0, a);
    }
  }
  return static_cast<T>(a / b);
}

template <class T>
T negated(T value) {
  if constexpr (kIsFloat<T>) {
    return bits_as<T>(static_cast<Bits<T>>(bits_as<Bits<T>>(value) ^ Bits<T>{1} << (8 * sizeof(T) - 1)));
  } else {
    return difference<T>(0, value);
  }
}
template <class T>
T magnitude(T value) {
  if constexpr (kIsFloat<T>) {
    return bits_as<T>(static_cast<Bits<T>>(bits_as<Bits<T>>(value) & ~(Bits<T>{1} << (8 * sizeof(T) - 1))));
  } else {
    return value < 0 ? difference<T>(0, value) : value;
  }
}
inline bool inverted(bool value) { return !value; }
template <class T>
T inverted(T value) {
  return static_cast<T>(~value);
}

// The smaller number; of a number and NaN, the number.
template <class T>
T smaller(T a, T b) {
  if constexpr (kIsFloat<T>) {
    if (is_nan(a)) return b;
    if (is_nan(b)) return a;
  }
  return b < a ? b : a;
}
template <class T>
T larger(T a, T b) {
  if constexpr (kIsFloat<T>) {
    if (is_nan(a)) return b;
    if (is_nan(b)) return a;
  }
  return a < b ? b : a;
}

template <class T, class Count>
T shifted_left(T value, Count count) {
  const auto places = static_cast<uint32_t>(count);
  return places >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<Bits<T>>(value) << places);
}
template <class T, class Count>
T shifted_right(T value, Count count) {
  const auto places = static_cast<uint32_t>(count);
  if (places >= 8 * sizeof(T)) return value < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(value >> places);
}

// `count` bits from `place` on; those past the end are zeros or copies of the sign.
template <class T>
T bit_field(T value, uint32_t place, uint32_t count) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  place &= 255;
  count &= 255;
  if (count == 0) return 0;
  const T from_place = shifted_right(value, place);
  if (count >= kBits) return from_place;
  const uint32_t unused = kBits - count;
  // Where the field goes past the end, its sign is that of the number, with which the shift has filled it up.
  return shifted_right(shifted_left(from_place, unused), unused);
}

// Each of the four low hexadecimal digits of `choice` says which of the eight bytes, a's first, comes there; with its
// highest bit set, only that byte's sign, eight times.
inline uint32_t bytes_chosen(uint32_t a, uint32_t b, uint32_t choice) {
  const uint64_t eight = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = choice >> 4 * i;
    auto byte = static_cast<uint8_t>(eight >> 8 * (digit & 7));
    if (digit & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= static_cast<uint32_t>(byte) << 8 * i;
  }
  return out;
}

template <class T>
T population(T value) {
  return static_cast<T>(std::popcount(static_cast<Bits<T>>(value)));
}
template <class T>
T leading_zeros(T value) {
  return static_cast<T>(std::countl_zero(static_cast<Bits<T>>(value)));
}

inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline float power_of_two(float value) { return std::exp2(value); }
template <class T>
T reciprocal(T value) {
  return 1 / value;
}
template <class T>
T reciprocal_root(T value) {
  return 1 / std::sqrt(value);
}

template <class T>
T rni(T value) {
  return std::nearbyint(value);
}
template <class T>
T rzi(T value) {
  return std::trunc(value);
}
template <class T>
T rmi(T value) {
  return std::floor(value);
}
template <class T>
T rpi(T value) {
  return std::ceil(value);
}
inline float saturated(float value) { return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f; }  // NaN: 0

template <class T, class From>
T to_integer(From value) {
  if (is_nan(value)) return 0;
  if (static_cast<double>(value) <= static_cast<double>(std::numeric_limits<T>::min())) {
    return std::numeric_limits<T>::min();
  }
  if (static_cast<double>(value) >= static_cast<double>(std::numeric_limits<T>::max())) {
    return std::numeric_limits<T>::max();
  }
  return static_cast<T>(value);
}

// Memory -------------------------------------------------------------------------------------------------------------

inline void aligned(uint64_t address, size_t bytes, const char* what) {
  if (address % bytes != 0) emulator::fail(std::string(what) + " of " + std::to_string(bytes) + " bytes, misaligned");
}

inline unsigned char* shared_memory(uint64_t address, size_t bytes, const char* what) {
  const uint64_t at = static_cast<uint32_t>(address);
  aligned(at, bytes, what);
  if (at < kShared || at + bytes > kShared + emulator::shared_declared()) {
    emulator::fail(std::string(what) + " of shared memory at byte " +
                   std::to_string(static_cast<int64_t>(at) - static_cast<int64_t>(kShared)) + " of " +
                   std::to_string(emulator::shared_declared()));
  }
  return emulator::shared_base() + (at - kShared);
}

inline unsigned char* host_memory(uint64_t address, size_t bytes, const char* what) {
  aligned(address, bytes, what);
  return reinterpret_cast<unsigned char*>(address);
}

inline const unsigned char* param_load(uint64_t address, size_t bytes) {
  return host_memory(address, bytes, "a load of a parameter");
}
inline const unsigned char* global_load(uint64_t address, size_t bytes) {
  return host_memory(address, bytes, "a load");
}
inline const unsigned char* generic_load(uint64_t address, size_t bytes) {
  return host_memory(address, bytes, "a load");
}
inline const unsigned char* local_load(uint64_t address, size_t bytes) { return host_memory(address, bytes, "a load"); }
inline const unsigned char* shared_load(uint64_t address, size_t bytes) {
  return shared_memory(address, bytes, "a load");
}
inline unsigned char* global_store(uint64_t address, size_t bytes) { return host_memory(address, bytes, "a store"); }
inline unsigned char* generic_store(uint64_t address, size_t bytes) { return host_memory(address, bytes, "a store"); }
inline unsigned char* local_store(uint64_t address, size_t bytes) { return host_memory(address, bytes, "a store"); }
inline unsigned char* shared_store(uint64_t address, size_t bytes) { return shared_memory(address, bytes, "a store"); }

inline uint64_t to_shared(uint64_t generic) {
  return generic - reinterpret_cast<uint64_t>(emulator::shared_base()) + kShared;
}
inline uint64_t from_shared(uint64_t address) {
  return reinterpret_cast<uint64_t>(emulator::shared_base()) + (static_cast<uint32_t>(address) - kShared);
}

template <class T>
T at(const unsigned char* from, int i) {
  T value;
  std::memcpy(static_cast<void*>(&value), from + static_cast<size_t>(i) * sizeof(T), sizeof(T));
  return value;
}
template <class T>
void store(unsigned char* into, int i, T value) {
  std::memcpy(into + static_cast<size_t>(i) * sizeof(T), static_cast<const void*>(&value), sizeof(T));
}

inline void copy_async(uint64_t destination, uint64_t source, size_t bytes, uint32_t read) {
  if (read != 0 && read != bytes) emulator::fail("cp.async of a part");
  emulator::copy_async(shared_memory(destination, bytes, "cp.async"), host_memory(source, bytes, "cp.async"), bytes,
                       read != 0);
}

// Of a whole warp ----------------------------------------------------------------------------------------------------

inline void warp_barrier() { emulator::gather("bar.warp.sync", 0); }

inline uint32_t shuffled(const char* how, uint32_t value, int from, uint32_t mask) {
  if (mask != 0xffffffffu) emulator::fail("shfl.sync with a partial mask");
  return emulator::gather(how, value)[static_cast<size_t>(from)];
}

// The lane that is read and whether it is inside, as the PTX ISA has it: `clamp` holds a segment mask and a bound.
inline uint32_t shuffle_bfly(uint32_t value, uint32_t distance, uint32_t clamp, uint32_t mask, bool& inside) {
  const int me = emulator::lane(), segment = static_cast<int>(clamp >> 8 & 31);
  const int last = (me & segment) | (static_cast<int>(clamp & 31) & ~segment);
  const int from = me ^ static_cast<int>(distance);
  inside = from <= last;
  return shuffled("shfl.bfly", value, inside ? from : me, mask);
}
inline uint32_t shuffle_idx(uint32_t value, uint32_t index, uint32_t clamp, uint32_t mask, bool& inside) {
  const int me = emulator::lane(), segment = static_cast<int>(clamp >> 8 & 31);
  const int first = me & segment, last = first | (static_cast<int>(clamp & 31) & ~segment);
  const int from = first | (static_cast<int>(index & 31) & ~segment);
  inside = from <= last;
  return shuffled("shfl.idx", value, inside ? from : me, mask);
}
inline uint32_t shuffle_down(uint32_t value, uint32_t distance, uint32_t clamp, uint32_t mask, bool& inside) {
  const int me = emulator::lane(), segment = static_cast<int>(clamp >> 8 & 31);
  const int last = (me & segment) | (static_cast<int>(clamp & 31) & ~segment);
  const int from = me + static_cast<int>(distance & 31);
  inside = from <= last;
  return shuffled("shfl.down", value, inside ? from : me, mask);
}
inline uint32_t shuffle_up(uint32_t value, uint32_t distance, uint32_t clamp, uint32_t mask, bool& inside) {
  const int me = emulator::lane(), segment = static_cast<int>(clamp >> 8 & 31);
  const int from = me - static_cast<int>(distance & 31);
  inside = from >= ((me & segment) | (static_cast<int>(clamp & 31) & ~segment));
  return shuffled("shfl.up", value, inside ? from : me, mask);
}

template <class T, class Combine>
T reduced(T value, uint32_t mask, Combine combine) {
  if (mask != 0xffffffffu) emulator::fail("redux.sync with a partial mask");
  const auto all = emulator::gather("redux", value);
  T out = all[0];
  for (size_t i = 1; i < all.size(); ++i) out = combine(out, all[i]);
  return out;
}

// Matrix i has its rows where lanes 8 i to 8 i + 7 say.
template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t (&out)[4], uint64_t address) {
  const void* row = emulator::shared_base();
  if (emulator::lane() < 8 * kMatrices) row = shared_memory(address, 16, "ldmatrix");
  if constexpr (kTransposed) {
    xsep::cuda::ldmatrix_x4_transposed(out, row);
  } else {
    xsep::cuda::ldmatrix_x4(out, row);
  }
}

// As load_matrices, the other way: each lane writes what it holds of each matrix.
template <int kMatrices, bool kTransposed>
void store_matrices(uint64_t address, std::array<uint32_t, kMatrices> values) {
  unsigned char* row = nullptr;
  const int lane = emulator::lane();
  if (lane < 8 * kMatrices) row = shared_memory(address, 16, "stmatrix");
  const auto rows = emulator::gather("stmatrix", row);
  for (int i = 0; i < kMatrices; ++i) {
    for (int k = 0; k < 2; ++k) {
      const int along = lane % 4 * 2 + k, across = lane / 4;
      const auto value = static_cast<uint16_t>(values[i] >> 16 * k);
      store(rows[8 * i + (kTransposed ? along : across)], kTransposed ? across : along, value);
    }
  }
}

// Of a whole warp group -----------------------------------------------------------------------------------------------

// Where element k of a row of M or N lies, as a matrix descriptor says (PTX ISA, "Canonical Layouts" and "Matrix
// Descriptor Format" of wgmma). Memory runs along k, or, transposed, along the rows. In 16-byte units: `across` counts
// rows of as many units as the swizzle spans, and eight of these rows make an atom; `along` counts units.
inline uint64_t tile_address(uint64_t descriptor, bool transposed, int row, int k, int bytes) {
  const auto field = [&](int bit) { return (descriptor >> bit & 0x3fff) << 4; };
  if ((descriptor >> 49 & 7) != 0) emulator::fail("wgmma with a base offset");
  constexpr std::array<unsigned, 4> kSpans = {1, 8, 4, 2};
  const unsigned span = kSpans[descriptor >> 62];
  const auto byte = static_cast<unsigned>((transposed ? row : k) * bytes);
  const unsigned along = byte / 16, across = static_cast<unsigned>(transposed ? k : row);
  uint64_t leading = field(16), stride = field(32);
  if (transposed && span == 1) std::swap(leading, stride);
  const uint64_t at =
      field(0) + across % 8 * span * 16 + across / 8 * stride + along % span * 16 + along / span * leading;
  return (at ^ (at >> 3 & (span - 1) << 4)) + byte % 16;
}

// 32 bits of a tile's row: word `place` of its eight, which hold two k of 16 bits, or one of 32.
template <class T>
uint32_t tile_word(uint64_t descriptor, bool transposed, int row, int place) {
  constexpr int kParts = 4 / sizeof(T);
  uint32_t word = 0;
  for (int i = 0; i < kParts; ++i) {
    const uint64_t address = tile_address(descriptor, transposed, row, place * kParts + i, sizeof(T));
    Bits<T> part;
    emulator::read_async(shared_memory(address, sizeof(T), "wgmma"), &part, sizeof(T));
    word |= static_cast<uint32_t>(part) << 8 * sizeof(T) * i;
  }
  return word;
}

// A lane's part of a 64-row tile, as it would hold it in registers: warp w has rows 16 w to 16 w + 15, laid out as in
// mma.
template <class T>
void tile_fragment(uint32_t (&out)[4], uint64_t descriptor, bool transposed) {
  const int lane = emulator::lane(), warp = emulator::lane_of_warp_group() / 32;
  for (int i = 0; i < 4; ++i) {
    out[i] = tile_word<T>(descriptor, transposed, 16 * warp + lane / 4 + i % 2 * 8, lane % 4 + i / 2 * 4);
  }
}

template <class T>
void numbers_of(uint32_t word, float* out) {
  if constexpr (sizeof(T) == 4) {
    out[0] = xsep::cuda::host::round_to_tf32(word);
  } else {
    for (int i = 0; i < 2; ++i) out[i] = xsep::cuda::host::element<T>(word, i);
  }
}

// wgmma.mma_async; T is float for tf32. The product is there at once: a kernel that reads it before the wait is not
// caught, one that by then has overwritten what the tensor core reads of shared memory is.
template <class T, int kColumns>
void warp_group_mma(const char* name, float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t descriptor,
                    bool transposed) {
  constexpr int kWords = 8, kParts = 4 / sizeof(T), kDepth = kWords * kParts, kGroup = emulator::kWarpGroup;
  struct Share {
    uint64_t descriptor;
    uint32_t a[4], b[16];
  };
  // Each lane reads its part of B for all.
  Share mine{descriptor, {a[0], a[1], a[2], a[3]}, {}};
  const int me = emulator::lane_of_warp_group(), lane = emulator::lane();
  for (int i = me; i < kColumns * kWords; i += kGroup) {
    mine.b[i / kGroup] = tile_word<T>(descriptor, transposed, i / kWords, i % kWords);
  }
  static_assert(sizeof(Share) <= emulator::kMaxGroupSlotBytes && kColumns * kWords <= 16 * kGroup);
  const auto& slots = emulator::warp_group_exchange(name, &mine, sizeof(mine));
  const auto share = [&](int of) { return reinterpret_cast<const Share*>(slots[static_cast<size_t>(of)].data()); };
  for (int i = 0; i < kGroup; ++i) {
    if (share(i)->descriptor != descriptor) emulator::fail("a warp group with several descriptors");
  }

  float rows[2][kDepth], columns[2][kDepth];
  for (int half = 0; half < 2; ++half) {
    for (int word = 0; word < kWords; ++word) {
      const int holder = me / 32 * 32 + lane / 4 * 4 + word % 4;
      numbers_of<T>(share(holder)->a[half + word / 4 * 2], &rows[half][word * kParts]);
    }
  }
  for (int eight = 0; eight < kColumns / 8; ++eight) {
    for (int side = 0; side < 2; ++side) {
      for (int word = 0; word < kWords; ++word) {
        const int place = (8 * eight + lane % 4 * 2 + side) * kWords + word;
        numbers_of<T>(share(place % kGroup)->b[place / kGroup], &columns[side][word * kParts]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      float sum = d[4 * eight + i];
      for (int k = 0; k < kDepth; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
      d[4 * eight + i] = sum;
    }
  }
}

}  // namespace machine
