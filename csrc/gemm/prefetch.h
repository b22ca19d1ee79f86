// Memory asked for a few lines at a time, while other memory is worked on: a burst of prefetches would fill
// the line fill buffers, which what is needed now needs, too. Into the second-level cache.
#pragma once

#include "core/simd.h"

namespace hrmcore::HRMCORE_ISA {

struct PrefetchRange {
  const std::byte *next = nullptr, *end = nullptr;
};

HRMCORE_INLINE void prefetch_lines(PrefetchRange& f, std::int64_t lines) {
  for (; lines > 0 && f.next < f.end; --lines, f.next += 64) __builtin_prefetch(f.next, 0, 2);
}

}  // namespace hrmcore::HRMCORE_ISA
