// The KV cache's blocks of 64 tokens, each for all slots and heads (paged_attention.h), handed out to
// requests.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/memory.h"
#include "engine/paged_attention.h"

namespace hrmcore {

class KvCache {
 public:
  KvCache(const CacheShape& shape, std::int64_t capacity_blocks)
      : shape_(shape), capacity_(capacity_blocks) {}

  // Appends blocks until `blocks` has room for `tokens`. Throws std::bad_alloc, leaving everything as it was,
  // when the cache is full or the system has no memory left.
  void reserve(std::vector<std::byte*>& blocks, std::int64_t tokens);
  void release(std::vector<std::byte*>& blocks) noexcept;

  std::int64_t capacity() const { return capacity_; }
  std::int64_t used() const { return static_cast<std::int64_t>(owned_.size() - free_.size()); }
  const CacheShape& shape() const { return shape_; }

 private:
  CacheShape shape_;
  std::int64_t capacity_;
  std::vector<Memory> owned_;
  std::vector<std::byte*> free_;
};

}  // namespace hrmcore
