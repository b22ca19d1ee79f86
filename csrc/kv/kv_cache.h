// The KV cache's pages of 64 tokens, each for all slots and heads (paged_attention.h), handed out to
// requests.
#pragma once

#include <cstdint>
#include <vector>

#include "core/memory.h"
#include "kv/paged_attention.h"

namespace hrmcore {

class CacheFull : public OutOfMemory {
 public:
  CacheFull() : OutOfMemory("the KV cache is full") {}
};

class KvCache {
 public:
  KvCache(const CacheShape& shape, std::int64_t capacity_pages) : shape_(shape), capacity_(capacity_pages) {}

  // Appends pages until `pages` has room for `tokens`. Throws CacheFull, or OutOfMemory when the system has
  // none left; then everything is as it was.
  void reserve(std::vector<std::byte*>& pages, std::int64_t tokens);
  void release(std::vector<std::byte*>& pages) noexcept;

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
