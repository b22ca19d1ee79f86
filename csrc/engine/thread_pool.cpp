#include "engine/thread_pool.h"

#include <unistd.h>

#include <system_error>

namespace hrmcore {
namespace {

constexpr std::int64_t prefetch_limit = 128 << 10;  // fits beside the rest in the second-level cache
// Between two tokens a thread spins, longer pauses it sleeps.
constexpr auto patience_between_jobs = std::chrono::microseconds(300);
// A task takes some microseconds, a turn on the processor milliseconds.
constexpr auto patience_within_jobs = std::chrono::microseconds(100);

// Flush-to-zero for the life of this object: a product that meets denormals runs several times slower.
class FlushDenormals {
 public:
#if defined(HRMCORE_X86)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(HRMCORE_ARM64)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (std::uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  std::uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace

void Worker::hint(const PrefetchHint& later) {
  if (later.data == nullptr) return;
  const std::int64_t begin = later.tasks * rank_ / pool_.size_, end = later.tasks * (rank_ + 1) / pool_.size_;
  const std::int64_t bytes = (end - begin) * later.bytes_a_task;
  next_ = reinterpret_cast<const char*>(later.data) + begin * later.bytes_a_task;
  next_end_ = next_ + (bytes < prefetch_limit ? bytes : prefetch_limit);
}

void Worker::prefetch_some() {
  for (int line = 0; line < 4 && next_ < next_end_; ++line, next_ += 64) __builtin_prefetch(next_, 0, 2);
}

ThreadPool::ThreadPool(int threads) : cursors_(static_cast<std::size_t>(threads)), owner_(getpid()) {
  try {
    for (int rank = 1; rank < threads; ++rank) {
      threads_.emplace_back([this, rank] { loop(rank); });
      size_ = rank + 1;
    }
  } catch (const std::system_error&) {  // the system grants no more threads: slower, but right
  }
}

ThreadPool::~ThreadPool() {
  if (owner_ != getpid()) {
    // After a fork the threads exist only in the parent.
    for (auto& thread : threads_) thread.detach();
    return;
  }
  stop_.store(true);
  epoch_.fetch_add(1);
  between_jobs_.wake();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(Job job, void* context) noexcept {
  if (owner_ != getpid()) {
    // A forked child has only the calling thread, and perhaps a half of what the others were at.
    size_ = 1;
    arrived_.store(0, std::memory_order_relaxed);
    for (Cursor& cursor : cursors_) cursor.taken.store(0, std::memory_order_relaxed);
  }
  FlushDenormals flush;
  job_ = job;
  context_ = context;
  running_.store(size_ - 1, std::memory_order_relaxed);
  if (size_ > 1) {
    epoch_.fetch_add(1);
    between_jobs_.wake();
  }
  work(0);
  at_the_end_.wait(patience_within_jobs, [this] { return running_.load() == 0; }, pause_briefly);
}

void ThreadPool::work(int rank) {
  Worker worker(*this, rank);
  job_(context_, worker);
}

void ThreadPool::loop(int rank) {
  FlushDenormals flush;
  for (std::uint64_t seen = 0;; ++seen) {
    between_jobs_.wait(patience_between_jobs, [&] { return epoch_.load() != seen; }, pause_briefly);
    if (stop_.load()) return;
    work(rank);
    if (running_.fetch_sub(1) == 1) at_the_end_.wake();
  }
}

void ThreadPool::finish_phase(Worker& worker) {
  const std::uint64_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    for (Cursor& cursor : cursors_) cursor.taken.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1);
    if (size_ > 1) between_phases_.wake();  // a forked child must not touch its dead sleepers' mutex
    return;
  }
  between_phases_.wait(
      patience_within_jobs, [&] { return phase_.load() != phase; },
      [&] { worker.next_ < worker.next_end_ ? worker.prefetch_some() : pause_briefly(); });
}

}  // namespace hrmcore
