#include "engine/turns.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace hrmcore {
namespace {

constexpr auto patience = std::chrono::milliseconds(100);

}  // namespace

Turns::Turns() : owner_(getpid()) {}

bool Turns::take(const Interrupt& interrupt) {
  const std::thread::id self = std::this_thread::get_id();
  std::unique_lock<std::mutex> lock(mutex_);
  forget_threads_before_fork();
  if (std::find(queue_.begin(), queue_.end(), self) != queue_.end()) {
    throw std::runtime_error(
        "step: this thread is inside a step of the engine; what runs then (a signal's handler, a finaliser, "
        "`stop`) may close requests, not step them");
  }
  queue_.push_back(self);
  while (!passed_.wait_for(lock, patience, [&] { return queue_.front() == self; })) {
    lock.unlock();
    const bool stop = interrupt.wanted != nullptr && interrupt.wanted(interrupt.context);
    if (stop) leave_queue();
    if (stop) return false;
    lock.lock();
  }
  return true;
}

void Turns::pass() noexcept { leave_queue(); }

// The next in the queue may now be the first.
void Turns::leave_queue() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.erase(std::find(queue_.begin(), queue_.end(), std::this_thread::get_id()));
  }
  passed_.notify_all();
}

// A forked child has only the thread that forked; the turns of the others will never end.
void Turns::forget_threads_before_fork() {
  if (owner_ == getpid()) return;
  owner_ = getpid();
  const auto gone = [](std::thread::id thread) { return thread != std::this_thread::get_id(); };
  queue_.erase(std::remove_if(queue_.begin(), queue_.end(), gone), queue_.end());
}

}  // namespace hrmcore
