// The KV cache's pages of 64 tokens, each for all slots and heads (paged_attention.h), handed out to
// requests. A page may have several owners; it is free again when the last of them has released it.
#pragma once

#include <cstdint>
#include <unordered_map>
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
  // One more owner for each of these pages. Throws std::bad_alloc; then everything is as it was.
  void share(const std::vector<std::byte*>& pages);
  // Takes the pages from index `first` on out of the vector.
  void release(std::vector<std::byte*>& pages, std::size_t first = 0) noexcept;

  std::int64_t capacity() const { return capacity_; }
  std::int64_t used() const { return static_cast<std::int64_t>(owned_.size() - free_.size()); }
  const CacheShape& shape() const { return shape_; }

 private:
  CacheShape shape_;
  std::int64_t capacity_;
  std::vector<Memory> owned_;
  std::vector<std::byte*> free_;
  std::unordered_map<const std::byte*, std::int64_t> shared_;  // owners beyond the first
};

}  // namespace hrmcore
