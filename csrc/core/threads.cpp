#include "core/threads.h"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace hrmcore {
namespace {

thread_local bool inside_region = false;

int available_processors() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

std::atomic<int>& thread_count() {
  static std::atomic<int> count{available_processors()};
  return count;
}

struct Region {
  std::int64_t count;
  std::int64_t grain;
  BlockBody body;
  void* context;
  std::atomic<std::int64_t> next{0};

  void work() {
    inside_region = true;
    for (;;) {
      const std::int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) break;
      body(context, begin, begin + grain < count ? begin + grain : count);
    }
    inside_region = false;
  }
};

// The fallback where the process has no OpenMP runtime.
class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { loop(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int workers() const { return static_cast<int>(threads_.size()); }

  void run(Region& region) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      region_ = &region;
      pending_ = workers();
      ++generation_;
    }
    wake_.notify_all();
    region.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    region_ = nullptr;
  }

 private:
  void loop() {
    std::uint64_t seen = 0;
    for (;;) {
      Region* region = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        region = region_;
      }
      region->work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Region* region_ = nullptr;
  int pending_ = 0;
  std::uint64_t generation_ = 0;
  bool stop_ = false;
};

std::mutex pool_mutex;
std::unique_ptr<Pool> pool;
std::atomic<bool> forked{false};

// Threads do not survive a fork, and an OpenMP runtime that had some waits for them for ever. So the child
// abandons the pool object, not joining it, and borrows nobody's team again.
void survive_forks() {
  static const int registered = pthread_atfork([] { pool_mutex.lock(); }, [] { pool_mutex.unlock(); },
                                               [] {
                                                 (void)pool.release();
                                                 forked.store(true);
                                                 pool_mutex.unlock();
                                               });
  (void)registered;  // fails only for want of memory; then forks are as dangerous as without it
}

void run_on_pool(Region& region, int threads) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (!pool || pool->workers() != threads - 1) {
    pool.reset();
    try {
      pool = std::make_unique<Pool>(threads - 1);
    } catch (const std::exception&) {  // the system grants no more threads: slower, but right
      region.work();
      return;
    }
  }
  pool->run(region);
}

// torch's OpenMP workers spin for milliseconds after each of its own regions and would fight a second team
// for the processors. So where an OpenMP runtime is loaded (torch makes it globally visible), its team is
// borrowed. On macOS torch's runtime has no such entry, and the pool serves.
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMpParallel openmp_parallel() {
  static std::atomic<OpenMpParallel> found{nullptr};
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  OpenMpParallel parallel = found.load(std::memory_order_relaxed);
  if (parallel == nullptr) {
    parallel = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(parallel, std::memory_order_relaxed);
  }
  return parallel;
}

}  // namespace

int num_threads() { return thread_count().load(); }

void set_num_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("threads must be between 1 and 1024, got " + std::to_string(threads));
  }
  thread_count().store(threads);
}

void run_blocks(std::int64_t count, std::int64_t grain, BlockBody body, void* context) noexcept {
  if (count <= 0) return;
  Region region{count, grain < 1 ? 1 : grain, body, context};
  const std::int64_t blocks = (count + region.grain - 1) / region.grain;
  const int threads = static_cast<int>(blocks < num_threads() ? blocks : num_threads());
  if (threads == 1 || inside_region) {
    const bool outer = inside_region;
    region.work();
    inside_region = outer;
    return;
  }
  survive_forks();
  if (OpenMpParallel parallel = openmp_parallel()) {
    parallel([](void* r) { static_cast<Region*>(r)->work(); }, &region, static_cast<unsigned>(threads), 0);
  } else {
    run_on_pool(region, threads);
  }
}

}  // namespace hrmcore
