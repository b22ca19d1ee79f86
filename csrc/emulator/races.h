// The race detector: for every two bytes of memory, who wrote and who read them last, and when.
//
// Time is a count of synchronisations. An access at tick t happens before everything that a thread does after
// it passed, together with the accessing thread, a barrier at a tick later than t; each thread knows the last
// barrier it shared with its warp (`__syncwarp` of the whole warp), with its block and with the grid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace hrmcore::emulator {

// A thread of a launch: block * 1024 + index in the block.
using ThreadId = std::uint32_t;
constexpr ThreadId threads_per_block = 1024;
constexpr ThreadId lanes_per_warp = 32;

// An accessing thread, and the tick of the last barrier that it shares with others, by how near they are.
struct Observer {
  ThreadId id = 0;
  std::uint32_t now = 0;
  std::uint32_t with_warp = 0, with_block = 0, with_grid = 0;
};

struct Conflict {
  bool found = false;
  bool with_write = false;
  ThreadId other = 0;
};

class Cell {
 public:
  Conflict read(const Observer& who);
  // Whether nobody has read it since the last barrier of the grid.
  bool unread(const Observer& who) const { return read_tick_ < who.with_grid; }
  Conflict write(const Observer& who);

 private:
  enum Readers : std::uint32_t { one, of_warp, of_block, of_grid };
  static Readers relation(ThreadId a, ThreadId b);
  static bool before(std::uint32_t tick, Readers relation, const Observer& who);

  ThreadId writer_ = 0;
  std::uint32_t write_tick_ = 0;
  ThreadId reader_ = 0;
  std::uint32_t read_tick_ : 30;  // of the latest read
  std::uint32_t readers_ : 2;     // how far apart those are that are not ordered with each other

 public:
  Cell() : read_tick_(0), readers_(one) {}
};

constexpr std::size_t cell_bytes = 2;

// The cells of any addresses, made when first touched.
class GlobalCells {
 public:
  Cell* at(std::uintptr_t address);
  void forget();
  std::size_t bytes() const { return pages_.size() * page_bytes / cell_bytes * sizeof(Cell); }

 private:
  static constexpr std::uintptr_t page_bytes = 4096;
  static constexpr std::size_t recent_pages = 256;
  struct Recent {
    std::uintptr_t page = 0;
    Cell* cells = nullptr;
  };
  std::unordered_map<std::uintptr_t, std::unique_ptr<Cell[]>> pages_;
  Recent recent_[recent_pages];
};

}  // namespace hrmcore::emulator
