// The threads of one engine. A job runs on all of them from beginning to end and is cut into phases; between
// phases stands a barrier, not a fork and join, because a token has about a thousand phases. Who waits there
// spins, longer than the machine alone ever makes him wait; then he sleeps, so that the thread he waits for gets
// his processor if it has lost its own.
//
// A phase's tasks are dealt out in equal runs, one to each thread, so that each reads its own stretch of the
// weights; who is done early takes from the others. Which thread runs a task must not matter to its result.
// While a thread waits it prefetches the weights that it will need first in a later phase.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "engine/waiting_room.h"

namespace hrmcore {

class ThreadPool;

// Tasks of a later phase that will read memory, `bytes_a_task` each, in order from `data`.
struct PrefetchHint {
  const std::byte* data = nullptr;
  std::int64_t bytes_a_task = 0;
  std::int64_t tasks = 0;
};

// One thread's view of its pool during a job.
class Worker {
 public:
  Worker(ThreadPool& pool, int rank) : pool_(pool), rank_(rank) {}
  int rank() const { return rank_; }

  // Runs f(task) for this thread's part of [0, tasks); returns when all of the pool's tasks are done.
  template <class F>
  void parallel_for(std::int64_t tasks, const F& f);

  // From now on, waiting prefetches this.
  void hint(const PrefetchHint& later);

 private:
  friend class ThreadPool;
  void prefetch_some();

  ThreadPool& pool_;
  const int rank_;
  const char* next_ = nullptr;
  const char* next_end_ = nullptr;
};

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // fewer if the system grants no more
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // job(context, worker) on every thread of the pool, this one included; not reentrant. Denormals are zero
  // meanwhile.
  using Job = void (*)(void* context, Worker& worker);
  void run(Job job, void* context) noexcept;

 private:
  friend class Worker;
  struct alignas(64) Cursor {
    std::atomic<std::int64_t> taken{0};
  };

  void loop(int rank);
  void finish_phase(Worker& worker);
  void work(int rank);

  int size_ = 1;
  std::vector<Cursor> cursors_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint64_t> phase_{0};
  alignas(64) std::atomic<std::uint64_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  Job job_ = nullptr;
  void* context_ = nullptr;
  WaitingRoom between_jobs_, between_phases_, at_the_end_;
  std::vector<std::thread> threads_;
  pid_t owner_;
};

template <class F>
void Worker::parallel_for(std::int64_t tasks, const F& f) {
  const int size = pool_.size_;
  for (int offset = 0; offset < size; ++offset) {
    const int victim = (rank_ + offset) % size;
    const std::int64_t begin = tasks * victim / size, count = tasks * (victim + 1) / size - begin;
    std::atomic<std::int64_t>& taken = pool_.cursors_[static_cast<std::size_t>(victim)].taken;
    while (taken.load(std::memory_order_relaxed) < count) {
      const std::int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
      if (task < count) f(begin + task);
    }
  }
  pool_.finish_phase(*this);
}

}  // namespace hrmcore
