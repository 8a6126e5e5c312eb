// Memory for tensors that may be large.
#include <sys/mman.h>

#include "glue.h"

namespace xsep::cpu {
namespace {

constexpr uintptr_t kLargePage = uintptr_t{2} << 20;
/// Smaller blocks are seldom given back to the system when they are freed: glibc keeps a heap's free end of up to twice
/// the largest block freed so far, and of a block of 32 MiB nothing.
constexpr size_t kReturnedBytes = size_t{4} << 20;

}  // namespace

/// A block fresh from the system costs a fault for every page that is first written, more than the kernels that write
/// it. Linux hands out 2 MiB at a fault where it is asked to ("madvise" is the usual setting of transparent huge
/// pages).
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  if (t.nbytes() >= kReturnedBytes) {
    const auto address = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
    const uintptr_t end = (address + t.nbytes()) / kLargePage * kLargePage;
    // Advice: where it is refused, pages are small.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

}  // namespace xsep::cpu
