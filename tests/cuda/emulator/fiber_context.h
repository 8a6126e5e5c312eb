// From one fiber to another. The C library's own way asks the kernel for the signal mask each time, which is most of
// what a switch then takes, and kernels switch at every barrier; here only what a call has to keep is kept.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)

namespace emulator {

using Context = void*;  // of a fiber that stands still: its stack's pointer, with the registers on the stack

extern "C" __attribute__((visibility("hidden"))) void emulator_switch_context(Context* from, Context to);

asm(R"(
.pushsection .text
.hidden emulator_switch_context
.globl emulator_switch_context
.type emulator_switch_context, @function
emulator_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");

inline void switch_context(Context& from, Context& to) { emulator_switch_context(&from, to); }

// entry must not return.
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kRegisters = 6;
  // As after a call: 8 bytes below a multiple of 16, where the address to return to lies.
  auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < kRegisters; ++i) *--top = 0;
  context = top;
}

}  // namespace emulator

#else

#include <ucontext.h>

namespace emulator {

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace emulator

#endif
