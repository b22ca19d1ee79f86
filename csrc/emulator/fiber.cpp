#include "emulator/fiber.h"

#include <cstring>

// Only what a called function must preserve is saved: both instruction sets' C calling conventions.
#if defined(__x86_64__)
asm(R"(
  .text
  .globl hrmcore_switch_fiber
  .hidden hrmcore_switch_fiber
  .type hrmcore_switch_fiber, @function
hrmcore_switch_fiber:
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
  .size hrmcore_switch_fiber, . - hrmcore_switch_fiber
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .globl hrmcore_switch_fiber
  .hidden hrmcore_switch_fiber
  .type hrmcore_switch_fiber, %function
hrmcore_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size hrmcore_switch_fiber, . - hrmcore_switch_fiber
)");
#else
#error "the emulator switches fibers on x86-64 and aarch64 only; build with -DHRMCORE_EMULATOR=OFF"
#endif

namespace hrmcore::emulator {

void* new_fiber(std::byte* end, void (*entry)()) {
#if defined(__x86_64__)
  constexpr std::size_t frame = 64, return_address = 48;  // six registers, the entry, a return address of 0
#else
  constexpr std::size_t frame = 160, return_address = 88;  // x30
#endif
  std::byte* stack = end - frame;
  std::memset(stack, 0, frame);
  std::memcpy(stack + return_address, &entry, sizeof(entry));
  return stack;
}

}  // namespace hrmcore::emulator
