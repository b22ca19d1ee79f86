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

void KvCache::share(const std::vector<std::byte*>& pages) {
  for (const std::byte* page : pages) shared_.try_emplace(page, 0);
  for (const std::byte* page : pages) ++shared_.at(page);
}

void KvCache::release(std::vector<std::byte*>& pages, std::size_t first) noexcept {
  for (std::size_t i = pages.size(); i-- > first;) {
    const auto found = shared_.find(pages[i]);
    if (found != shared_.end() && found->second > 0) {
      --found->second;
    } else {
      free_.push_back(pages[i]);
    }
  }
  if (first < pages.size()) pages.resize(first);
}

}  // namespace hrmcore
