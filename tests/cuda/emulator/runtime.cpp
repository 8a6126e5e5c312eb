// The few functions of the CUDA runtime and of PyTorch's CUDA that the operators call, for cards that are only facts.
#include <stdexcept>
#include <string>
#include <vector>

#include "entry.h"

namespace emulator {
namespace {

struct Card {
  int multiprocessors, shared_bytes, l2_bytes;

  bool operator==(const Card&) const = default;
};

// The first is nobody's: an operator that forgets to make its tensors' device the current one is found out.
std::vector<Card> cards{{1, 0, 0}, {132, 227 * 1024, 60 << 20}};
int tensors_lie_on = 1;
int current_device = 0;
int calls_to_refusal = 0;
int fault = 0;

cudaStream_t stream_of(int device) { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(device)); }

bool is_there(int device) { return device >= 0 && device < static_cast<int>(cards.size()); }

cudaError_t answer() {
  if (calls_to_refusal == 0 || --calls_to_refusal > 0) return cudaSuccess;
  return cudaErrorLaunchFailure;
}

}  // namespace

int device() { return tensors_lie_on; }
int planted_fault() { return fault; }

void begin_launch(const char* name, cudaStream_t stream) {
  if (stream != stream_of(current_device)) throw std::runtime_error("a launch on a stream of another device");
  if (answer() != cudaSuccess) throw std::runtime_error(std::string(name) + ": refused");
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// Tensors lie on a card of these facts from here on, which is not the current one; returns its index.
int emulate_card(int multiprocessors, int shared_bytes, int l2_bytes) {
  const Card wanted{multiprocessors, shared_bytes, l2_bytes};
  current_device = 0;
  tensors_lie_on = 1;
  while (is_there(tensors_lie_on) && cards[tensors_lie_on] != wanted) ++tensors_lie_on;
  if (!is_there(tensors_lie_on)) cards.push_back(wanted);
  return tensors_lie_on;
}

// The calls-th call of the runtime from here on, launches among them, ends in an error.
void emulate_refusal(int calls) { calls_to_refusal = calls; }

void emulate_fault(int number) { fault = number; }

int emulate_current_device() { return current_device; }

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return answer();
}

cudaError_t cudaSetDevice(int device) {
  if (!is_there(device)) return cudaErrorInvalidDevice;
  // Not refused on the way back: a destructor could not say so.
  if (current_device == 0 && answer() != cudaSuccess) return cudaErrorLaunchFailure;
  current_device = device;
  return cudaSuccess;
}

// PyTorch says -1 for the index of a CPU's tensor.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device == -1) device = tensors_lie_on;
  if (!is_there(device)) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cards[device].multiprocessors;
      return answer();
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cards[device].shared_bytes;
      return answer();
    case cudaDevAttrL2CacheSize:
      *value = cards[device].l2_bytes;
      return answer();
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  *attributes = {};
  return function == nullptr ? cudaErrorInvalidDeviceFunction : answer();
}

cudaError_t cudaGetLastError() { return answer(); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device" : "as the emulator was told to answer";
}

int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  if (!is_there(device)) return 1;
  *stream = stream_of(device);
  return 0;
}
}
