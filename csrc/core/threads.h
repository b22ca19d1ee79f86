// One way to run a loop on several threads. Work is handed out in blocks whose borders do not depend on the
// number of threads, so a kernel that keeps each block's arithmetic to itself gives the same bits for any
// thread count.
#pragma once

#include <cstdint>

namespace hrmcore {

using BlockBody = void (*)(void* context, std::int64_t begin, std::int64_t end);

int num_threads();
void set_num_threads(int threads);  // throws std::invalid_argument below 1 or above 1024

// Calls body on [0, count) in blocks of `grain`. A call from inside a body runs serially.
void run_blocks(std::int64_t count, std::int64_t grain, BlockBody body, void* context) noexcept;

}  // namespace hrmcore
