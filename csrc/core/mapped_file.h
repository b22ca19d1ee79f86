// Files that are cut short while they are mapped. Reading a page that its file no longer has raises SIGBUS,
// which ends a process by default. Here such a page and what follows it read as zeros from then on, and the
// range is lost.
//
// The signal's handler stands only while a MappedReading lives. A fault outside of every MappedRange, and a
// signal that is no such fault, goes to the handler that was there before, or to the system's default. Reads
// cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hrmcore {

struct RangeSlot;  // what the handler sees of a range

// Memory that a file is mapped to.
class MappedRange {
 public:
  MappedRange() = default;
  // Throws std::runtime_error when a thousand others live.
  MappedRange(const std::byte* data, std::int64_t bytes);
  ~MappedRange();
  MappedRange(MappedRange&& other) noexcept { swap(other); }
  MappedRange& operator=(MappedRange&& other) noexcept {
    swap(other);
    return *this;
  }

  // Whether a page was missing when a MappedReading wanted it.
  bool lost() const;
  void swap(MappedRange& other) noexcept;

 private:
  RangeSlot* slot_ = nullptr;
};

// Lives while ranges that are there already are read, by any thread.
class MappedReading {
 public:
  MappedReading();
  ~MappedReading();
  MappedReading(const MappedReading&) = delete;
  MappedReading& operator=(const MappedReading&) = delete;

 private:
  bool counted_;
};

}  // namespace hrmcore
