// Fibers: many call stacks on one operating-system thread, switched in a few instructions. (swapcontext makes
// a system call at every switch; a kernel switches millions of times.)
#pragma once

#include <cstddef>

namespace hrmcore::emulator {

// Saves the running fiber's registers on its stack, stores where into *save, and goes on with the fiber
// `next`.
extern "C" void hrmcore_switch_fiber(void** save, void* next);

// A fiber that starts in `entry`, which must never return, on a stack that ends at `end` (16-byte aligned).
void* new_fiber(std::byte* end, void (*entry)());

}  // namespace hrmcore::emulator
