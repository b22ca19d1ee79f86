#include "kv/kv_cache.h"

#include <algorithm>

namespace hrmcore {

void KvCache::reserve(std::vector<std::byte*>& pages, std::int64_t tokens) {
  const std::int64_t wanted = (tokens + page_tokens - 1) / page_tokens;
  const std::int64_t missing = wanted - static_cast<std::int64_t>(pages.size());
  if (missing <= 0) return;
  if (used() + missing > capacity_) throw CacheFull();
  pages.reserve(static_cast<std::size_t>(wanted));
  while (static_cast<std::int64_t>(free_.size()) < missing) {
    free_.reserve(owned_.size() + 1);  // so that neither this nor release can fail halfway
    owned_.emplace_back(shape_.page_bytes());
    free_.push_back(owned_.back().data());
  }
  for (std::int64_t i = 0; i < missing; ++i) {
    pages.push_back(free_.back());
    free_.pop_back();
  }
}

void KvCache::release(std::vector<std::byte*>& pages) noexcept {
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) free_.push_back(*page);
  pages.clear();
}

}  // namespace hrmcore
