#include "kv/kv_cache.h"

#include <algorithm>

namespace hrmcore {

void KvCache::reserve(std::vector<std::byte*>& blocks, std::int64_t tokens) {
  const std::int64_t wanted = (tokens + block_tokens - 1) / block_tokens;
  const std::int64_t missing = wanted - static_cast<std::int64_t>(blocks.size());
  if (missing <= 0) return;
  if (used() + missing > capacity_) throw CacheFull();
  blocks.reserve(static_cast<std::size_t>(wanted));
  while (static_cast<std::int64_t>(free_.size()) < missing) {
    free_.reserve(owned_.size() + 1);  // so that neither this nor release can fail halfway
    owned_.emplace_back(shape_.block_bytes());
    free_.push_back(owned_.back().data());
  }
  for (std::int64_t i = 0; i < missing; ++i) {
    blocks.push_back(free_.back());
    free_.pop_back();
  }
}

void KvCache::release(std::vector<std::byte*>& blocks) noexcept {
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) free_.push_back(*block);
  blocks.clear();
}

}  // namespace hrmcore
