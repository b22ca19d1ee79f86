// The state of an emulated launch: what the schedule (emulator.cpp) and the accesses to memory (memory.cpp) share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/races.h"

namespace hrmcore::emulator {

enum class Wait : std::uint8_t { nothing, warp, block, grid, over };

struct Block;

struct Copy {
  std::byte* shared;
  const std::byte* global;
  std::size_t bytes, filled;
  unsigned group;
};

struct Thread {
  Coordinates at;
  void* fiber = nullptr;
  std::byte* stack = nullptr;
  Block* block = nullptr;
  ThreadId id = 0;
  unsigned lane = 0;
  Wait wait = Wait::nothing;
  const char* what = "";
  Site site{"", 0};
  std::vector<Copy> copies;
  unsigned copy_group = 0;
};

struct WarpOperation {
  const char* what;
  unsigned mask, arrived;
  Site site;
  Combine combine;
  const void* in[32];
  void* out[32];
};

struct Warp {
  Block* block = nullptr;
  Thread* threads = nullptr;
  unsigned lanes = 0, finished = 0;  // bits
  std::uint32_t synchronised = 0;
  bool queued = false;
  std::vector<WarpOperation> operations;
};

struct Block {
  unsigned number = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::byte> shared;
  std::byte* shared_base = nullptr;
  std::vector<Cell> cells;
  std::uint32_t synchronised = 0, with_grid = 0;
  unsigned at_barrier = 0, finished = 0;
  Site barrier{"", 0};
  bool arrived = false;  // at the grid's barrier, and has not waited there
  unsigned arrival = 0;  // how often the barrier had opened then
};

struct Memory {  // of the stacks
  std::byte* base = nullptr;
  std::size_t bytes = 0;
};

struct Machine {
  std::mutex one_launch;
  std::uint64_t seed = 0, random = 0;
  std::size_t shared_bytes[most_devices] = {99 << 10, 99 << 10};
  std::uint64_t launches_on[most_devices] = {};
  Shape shape{dim3(), 0, 0, false};
  Site launch{"", 0};
  void (*body)(const void*) = nullptr;
  const void* params = nullptr;
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Warp*> ready;
  Memory stacks;
  GlobalCells global;
  std::uint32_t tick = 0;
  // What blocks do between their arrival at the grid's barrier and its opening comes after it: their ticks run
  // from `window_begin` on, ahead of those of the blocks that have yet to arrive.
  std::uint32_t window_begin = 0, window_tick = 0;
  std::uint32_t opened = 0;  // where the window of the last barrier to open began
  unsigned arrived = 0, openings = 0;
  Site grid_barrier{"", 0};
  void* scheduler = nullptr;
  Thread* current = nullptr;
  bool failed = false;
  std::string message;
  Counters counters;
};
extern Machine machine;

// How messages speak of a place in the source and of a thread.
std::string text(Site site);
std::string name(ThreadId id);

// End the launch with a message.
[[noreturn]] void stop(const std::string& message);
[[noreturn]] void stop_here(const std::string& message, Site site);

// Whether a block has arrived at the grid's barrier and the barrier has not opened since.
inline bool still_closed(const Block& block) { return block.arrived && block.arrival == machine.openings; }

inline std::uint32_t& tick_of(const Block& block) {
  return still_closed(block) ? machine.window_tick : machine.tick;
}

}  // namespace hrmcore::emulator
