#include "core/mapped_file.h"

#include <signal.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace hrmcore {

// begin is written last and cleared first: whoever sees it sees the rest.
struct RangeSlot {
  std::atomic<std::uintptr_t> begin{0};
  std::atomic<std::uintptr_t> end{0};
  std::atomic<bool> lost{false};
};

namespace {

// What the handler touches is there from the start and is never freed.
constexpr int slot_count = 1000;
RangeSlot slots[slot_count];
struct sigaction previous;
std::uintptr_t page_size = 0;

std::mutex mutex;  // of the following, and of taking a slot
std::int64_t ranges = 0, readings = 0;

static_assert(std::atomic<std::uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

RangeSlot* slot_around(std::uintptr_t address) {
  for (RangeSlot& slot : slots) {
    const std::uintptr_t begin = slot.begin.load(std::memory_order_acquire);
    if (begin != 0 && address >= begin && address < slot.end.load(std::memory_order_relaxed)) return &slot;
  }
  return nullptr;
}

// All from the missing page on: behind the end of a file no page is left. On Linux the bare call, because
// mmap() is not among the functions that a handler may call, and a sanitizer's mmap counts as a write to
// memory that others read. Two threads may come here with the same page; the second changes nothing.
bool read_as_zeros(const RangeSlot& slot, std::uintptr_t address) {
  const std::uintptr_t page = address / page_size * page_size;
  const std::uintptr_t bytes = slot.end.load(std::memory_order_relaxed) - page;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
#if defined(__linux__)
  return syscall(SYS_mmap, page, bytes, PROT_READ, flags, -1, 0) != -1;
#else
  return mmap(reinterpret_cast<void*>(page), bytes, PROT_READ, flags, -1, 0) != MAP_FAILED;
#endif
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
  const bool sent = info->si_code <= 0;
  if (sent && previous.sa_handler == SIG_IGN) return;
  // A fault happens again on return, a signal that someone sent is sent again; this time they meet what was
  // there.
  sigaction(signal, &previous, nullptr);
  if (sent) raise(signal);
}

void on_missing_page(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  RangeSlot* slot = info->si_code == BUS_ADRERR ? slot_around(address) : nullptr;
  if (slot != nullptr && read_as_zeros(*slot, address)) {
    slot->lost.store(true, std::memory_order_release);
  } else {
    pass_on(signal, info, context);
  }
  errno = saved;
}

}  // namespace

MappedRange::MappedRange(const std::byte* data, std::int64_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data), end = begin + static_cast<std::uintptr_t>(bytes);
  std::lock_guard<std::mutex> lock(mutex);
  page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  for (RangeSlot& slot : slots) {
    if (slot.begin.load(std::memory_order_relaxed) != 0) continue;
    slot.end.store((end + page_size - 1) / page_size * page_size, std::memory_order_relaxed);
    slot.lost.store(false, std::memory_order_relaxed);
    slot.begin.store(begin, std::memory_order_release);
    slot_ = &slot;
    ++ranges;
    return;
  }
  throw std::runtime_error("more than " + std::to_string(slot_count) +
                           " files are mapped; close some engines");
}

MappedRange::~MappedRange() {
  if (slot_ == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex);
  slot_->begin.store(0, std::memory_order_release);
  --ranges;
}

bool MappedRange::lost() const { return slot_ != nullptr && slot_->lost.load(std::memory_order_acquire); }

void MappedRange::swap(MappedRange& other) noexcept { std::swap(slot_, other.slot_); }

MappedReading::MappedReading() {
  std::lock_guard<std::mutex> lock(mutex);
  counted_ = ranges > 0;
  if (!counted_ || readings++ > 0) return;
  struct sigaction action{};
  action.sa_sigaction = on_missing_page;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &previous);
}

MappedReading::~MappedReading() {
  std::lock_guard<std::mutex> lock(mutex);
  if (!counted_ || --readings > 0) return;
  struct sigaction current{};
  sigaction(SIGBUS, nullptr, &current);
  // Whoever installed another meanwhile keeps it, and passes on to ours.
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_missing_page)
    sigaction(SIGBUS, &previous, nullptr);
}

}  // namespace hrmcore
