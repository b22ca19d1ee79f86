// Whose turn it is to step the engine: one thread's at a time, in the order in which they came.
//
// A turn is no lock. Python runs during it and while a thread waits for it (a signal's handler, a finaliser,
// `stop`), and may do anything but step the same engine; that would wait for itself, and is refused.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace hrmcore {

// Asked now and then, by a thread that holds no lock, whether it shall stop.
struct Interrupt {
  bool (*wanted)(void* context) noexcept = nullptr;
  void* context = nullptr;
};

class Turns {
 public:
  Turns();

  // Waits for this thread's turn, without the GIL; false when `interrupt`, asked every tenth of a second,
  // wanted to wait no longer. Throws std::runtime_error when this thread has its turn, or waits, already.
  bool take(const Interrupt& interrupt);
  // Ends this thread's turn.
  void pass() noexcept;

 private:
  void forget_threads_before_fork();
  void leave_queue() noexcept;

  std::mutex mutex_;  // of the following; never held where Python can run, nor while the GIL is waited for
  std::condition_variable passed_;
  std::deque<std::thread::id> queue_;  // the first has the turn
  pid_t owner_;
};

}  // namespace hrmcore
