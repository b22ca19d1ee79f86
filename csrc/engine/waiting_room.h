// Where threads wait for a condition: they spin for a while, then they sleep. A thread that has lost its
// processor to another program can then have the processor of one that waits for it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(HRMCORE_X86)
#include <immintrin.h>
#endif

namespace hrmcore {

inline void pause_briefly() {
#if defined(HRMCORE_X86)
  _mm_pause();
#elif defined(HRMCORE_ARM64)
  asm volatile("isb" ::: "memory");  // `yield` does nothing on most processors; this waits for some cycles
#else
  std::this_thread::yield();
#endif
}

class WaitingRoom {
 public:
  // Returns when ready() is true; calls meanwhile() as long as it spins. ready() must read what wake()'s caller
  // has written before with sequentially consistent loads: either it sees the change or wake() sees the sleeper.
  template <class Ready, class Meanwhile>
  void wait(std::chrono::nanoseconds patience, const Ready& ready, const Meanwhile& meanwhile) {
    constexpr int spins_between_looks = 32;  // at the clock
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (int spin = 1; !ready(); ++spin) {
      meanwhile();
      if (spin % spins_between_looks == 0 && std::chrono::steady_clock::now() > deadline) return sleep(ready);
    }
  }

  // After the condition was made true with a sequentially consistent store. Costs a load where nobody sleeps.
  void wake() {
    if (sleepers_.load() == 0) return;
    // Nobody is between his look at the condition and his sleep while the mutex is held.
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    wake_.notify_all();
  }

 private:
  template <class Ready>
  void sleep(const Ready& ready) {
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, ready);
    sleepers_.fetch_sub(1);
  }

  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace hrmcore
