// What a kernel stands on: the GPU, or the emulator of the tests, which runs the same sources as C++ on a CPU.
#pragma once

#ifdef XSEP_EMULATOR
#include "emulator.h"
#include "host_ptx.h"
#else
#include <cuda_runtime.h>

#include "ptx.cuh"
#endif

#include <cstdint>

#include "../common/cuda_plan.h"

namespace xsep::cuda {

// The CTA's dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_base() {
#ifdef XSEP_EMULATOR
  return emulator::shared_base();
#else
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
#endif
}

// The other way round: where in shared memory a pointer into it points.
__device__ __forceinline__ int shared_place(const unsigned char* p) { return static_cast<int>(p - shared_base()); }

// A buffer in shared memory, by its place: half the registers of a pointer.
template <class T>
struct SharedBuffer {
  int place;
  __device__ __forceinline__ T* get() const { return reinterpret_cast<T*>(shared_base() + place); }
  __device__ __forceinline__ T& operator[](int i) const { return get()[i]; }
};

// Equal buffers, one behind the other.
struct BufferRing {
  int first, step;
  __device__ __forceinline__ unsigned char* operator[](int i) const { return shared_base() + first + i * step; }
};

// The buffers a kernel carves out of shared memory: all threads take the same ones in the same order, at places of a
// layout made on the host or one behind the other. The emulator sets them apart, so that an index past the end of one
// does not land in the next.
class SharedArena {
 public:
  template <class T>
  __device__ __forceinline__ SharedBuffer<T> take(int count) {
    constexpr int kSize = static_cast<int>(sizeof(T)), kAlign = kSharedAlignment;
    const int place = next_;
    next_ += (count * kSize + kAlign - 1) / kAlign * kAlign;
    return take_at<T>(place, count);
  }

  template <class T>
  __device__ __forceinline__ SharedBuffer<T> take_at(int place, [[maybe_unused]] int count) {
#ifdef XSEP_EMULATOR
    return {emulator::shared_buffer(taken_++, place, count * static_cast<int>(sizeof(T)))};
#else
    return {place};
#endif
  }

  __device__ __forceinline__ BufferRing take_ring(int place, int count, int bytes) {
    const int step = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    BufferRing ring{place, step};
#ifdef XSEP_EMULATOR
    for (int i = 0; i < count; ++i) {
      const int taken = take_at<unsigned char>(place + i * step, bytes).place;
      if (i == 0) ring.first = taken;
      if (i == 1) ring.step = taken - ring.first;
    }
#else
    static_cast<void>(count);
#endif
    return ring;
  }

 private:
  int next_ = 0;
#ifdef XSEP_EMULATOR
  int taken_ = 0;
#endif
};

}  // namespace xsep::cuda
