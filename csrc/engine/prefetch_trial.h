// Whether asking for weights ahead pays on this machine, found out by the first steps themselves: on one
// processor it gained, on another it cost a tenth (docs/log). Steps that read all weights take turns, with and
// without; what took the shortest wins. No bit of a result depends on it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace hrmcore {

class PrefetchTrial {
 public:
  explicit PrefetchTrial(std::int64_t tokens = 0) : tokens_(tokens) {}

  // Whether the step of `tokens` that begins now asks ahead.
  bool begin(std::int64_t tokens) {
    if (decided()) return wanted_;
    if (tokens != tokens_) *this = PrefetchTrial(tokens);  // only equal work can be compared
    return asks();
  }

  // That step has ended; not called for one that was cut short.
  void end(std::chrono::nanoseconds took) {
    if (decided()) return;
    auto& best = asks() ? best_with_ : best_without_;
    best = std::min(best, took);
    ++steps_;
    wanted_ = best_with_ <= best_without_;
  }

  bool decided() const { return steps_ == 2 * rounds; }

 private:
  static constexpr int rounds = 6;  // the best of so many: others may disturb some

  bool asks() const { return steps_ % 2 == 0; }

  std::int64_t tokens_;
  int steps_ = 0;
  bool wanted_ = true;
  std::chrono::nanoseconds best_with_ = std::chrono::nanoseconds::max(), best_without_ = best_with_;
};

}  // namespace hrmcore
