// A 64-bit checksum of packed weights, to notice a file that was damaged or changed; not against malice.
//
// 256-byte stripes feed 64 lanes of 32 bits, lane = (lane ^ word) * odd: every single changed word changes
// its lane. Blocks of 1 MiB are summed on their own and their lanes folded in order, so the threads do not
// matter. A last, incomplete stripe counts as filled with zeros. Reads each byte once.
#pragma once

#include <cstddef>

#include "core/isa.h"

namespace hrmcore {

constexpr std::int64_t checksum_block = 1 << 20;

struct Checksum {
  const std::byte* data;
  std::int64_t bytes;
  std::uint64_t* blocks;  // one for each checksum_block bytes, the last one in part; written
};

HRMCORE_DECLARE_KERNEL(checksum_blocks, Checksum)

}  // namespace hrmcore
