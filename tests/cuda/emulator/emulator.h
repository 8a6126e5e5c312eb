// Runs CUDA kernels as ordinary C++, so that a machine without a GPU can hold them to the truth.
//
// One fiber stands for one CUDA thread, one block runs after another. Which fiber goes on is drawn from a seeded
// generator each time one stops, and a fiber stops only where CUDA lets threads meet: at a barrier or a warp
// collective. So a missing barrier gives other results under other seeds. Shared memory starts as NaN, its buffers
// lie apart, and what cp.async is to bring appears only at the wait: until then its destination holds NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

// Attributes that mean something to nvcc alone.
#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__
// What nvcc would say the library holds code for.
#define __CUDA_ARCH_LIST__ 900

namespace emulator {

inline constexpr int kWarp = 32;
inline constexpr int kWarpGroup = 4 * kWarp;
inline constexpr int kMaxSlotBytes = 64, kMaxGroupSlotBytes = 128;

struct Index {
  unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

// Stops the launch with an error that names the block and the thread.
[[noreturn]] void fail(const std::string& what);

void block_barrier();

// All lanes of the warp hand in `bytes` bytes; returns what the 32 lanes handed in. `collective` names the operation:
// lanes that meet in different ones are an error, as is a warp that is not whole.
using Slots = std::array<std::array<std::byte, kMaxSlotBytes>, kWarp>;
const Slots& warp_exchange(const char* collective, const void* data, size_t bytes);
int lane();
// The same of a warp group, four warps in a row whose first is a multiple of four. The slots hold until the caller
// next stops.
using GroupSlots = std::array<std::array<std::byte, kMaxGroupSlotBytes>, kWarpGroup>;
const GroupSlots& warp_group_exchange(const char* collective, const void* data, size_t bytes);
int lane_of_warp_group();

// Where in shared memory the block's n-th buffer lies, the same for every thread that asks; a gap follows each.
// `place` is where it lies on a GPU: buffers may not overlap there, nor go past what the launch asked for.
int shared_buffer(int ordinal, int place, int bytes);
unsigned char* shared_base();
size_t shared_declared();  // bytes that the launch asked for
// Fails where so many bytes lie outside of all shared memory, whose end a kernel compiled from C++ is not told.
void check_shared(const void* p, size_t bytes, const char* what);

void copy_async(void* destination, const void* source, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int groups_left);

// What hardware may read at any time until the wait: here it is read at once, and the wait fails where it has changed.
void read_async(const void* source, void* into, size_t bytes);
void read_async_commit();
void read_async_wait(int groups_left);

// The card that a CPU's tensors count as lying on: 0 for the tests that call a launcher directly, each other set of
// facts that a test asks for another one.
int device();
// Throws std::runtime_error where the stream is not the current device's, which is the device's number for a pointer,
// or where a test wants this launch to fail.
void begin_launch(const char* name, cudaStream_t stream);

// Which of the faults that a test has put into a copy of the sources is there; 0 for none.
int planted_fault();

// What was translated from the PTX of a kernel, and is to run in its place; null where it runs as C++. Its parameters
// are addresses of the kernel's, as cudaLaunchKernel takes them.
using Translation = void (*)(const void* const* parameters);
Translation translation(const void* kernel);

}  // namespace emulator

// How many instructions of each kind (tests/cuda/ptx.py) translations that count have run.
extern "C" uint64_t emulate_counts[16];

namespace emulator {

// Runs body once for each thread of each block. Throws std::runtime_error.
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

template <class Params>
void launch(void (*kernel)(Params), const char* name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Params& params) {
  begin_launch(name, stream);
  const void* parameters[] = {&params};
  if (const Translation translated = translation(reinterpret_cast<const void*>(kernel))) {
    run(name, grid, block, shared_bytes, [&] { translated(parameters); });
  } else {
    run(name, grid, block, shared_bytes, [&] { kernel(params); });
  }
}

void set_seed(uint32_t seed);

template <class T>
std::array<T, kWarp> gather(const char* collective, const T& mine) {
  static_assert(sizeof(T) <= kMaxSlotBytes);
  const Slots& slots = warp_exchange(collective, &mine, sizeof(T));
  std::array<T, kWarp> all;
  for (int i = 0; i < kWarp; ++i) std::memcpy(&all[i], slots[i].data(), sizeof(T));
  return all;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

inline void __syncthreads() { emulator::block_barrier(); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline bool __any_sync(unsigned mask, bool mine) {
  if (mask != 0xffffffffu) emulator::fail("__any_sync with a partial mask");
  bool any = false;
  for (const bool one : emulator::gather("__any_sync", mine)) any = any || one;
  return any;
}

inline void __syncwarp() { emulator::gather("__syncwarp", char()); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) emulator::fail("__shfl_xor_sync with a partial mask");
  return emulator::gather("__shfl_xor_sync", value)[emulator::lane() ^ distance];
}
