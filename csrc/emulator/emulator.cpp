#include "emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/machine.h"

namespace hrmcore::emulator {

const Coordinates* running = nullptr;
Machine machine;

std::string text(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string name(ThreadId id) {
  return "thread " + std::to_string(id % threads_per_block) + " of block " +
         std::to_string(id / threads_per_block);
}

[[noreturn]] void stop(const std::string& message) {
  machine.failed = true;
  machine.message = message + " (kernel launched at " + text(machine.launch) + ")";
  void* abandoned;
  hrmcore_switch_fiber(&abandoned, machine.scheduler);
  std::abort();  // an abandoned fiber is never resumed
}

[[noreturn]] void stop_here(const std::string& message, Site site) {
  stop(name(machine.current->id) + " at " + text(site) + ": " + message);
}

namespace {

constexpr std::size_t stack_bytes = 64 << 10;
constexpr std::uint64_t stack_mark = 0x6b6361747320656eu;
constexpr unsigned most_blocks_at_once = 8;
constexpr std::uint32_t window_room = 1 << 20;  // ticks for the blocks that have yet to arrive
constexpr std::size_t most_shadow_bytes = std::size_t{256} << 20;

std::uint64_t random_below(std::uint64_t bound) {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return (machine.random >> 11) % bound;
}

void yield() { hrmcore_switch_fiber(&machine.current->fiber, machine.scheduler); }

void make_ready(Thread& thread) {
  thread.wait = Wait::nothing;
  Warp& warp = thread.block->warps[thread.at.thread.x / 32];
  if (!warp.queued) {
    warp.queued = true;
    machine.ready.push_back(&warp);
  }
}

Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.at.thread.x / 32]; }

// ---- barriers

void release_block(Block& block) {
  block.at_barrier = 0;
  block.synchronised = ++tick_of(block);
  for (Warp& warp : block.warps) warp.synchronised = block.synchronised;
  ++machine.counters.block_barriers;
  for (Thread& thread : block.threads) {
    if (thread.wait == Wait::block) make_ready(thread);
  }
}

void open_grid() {
  machine.arrived = 0;
  ++machine.openings;
  machine.tick = machine.window_tick;
  machine.opened = machine.window_begin;
  ++machine.counters.grid_barriers;
  for (auto& block : machine.resident) {
    for (Thread& thread : block->threads) {
      if (thread.wait == Wait::grid) make_ready(thread);
    }
  }
}

unsigned blocks_of(const dim3& grid) { return grid.x * grid.y * grid.z; }

void leave() {
  Thread& me = *machine.current;
  Block& block = *me.block;
  if (!me.copies.empty()) stop_here("left the kernel with cp.async copies that it never waited for", me.site);
  std::uint64_t mark;
  std::memcpy(&mark, me.stack, sizeof(mark));
  if (mark != stack_mark) stop_here("used more than the emulator's 64 KiB of stack", me.site);
  if (block.at_barrier > 0) {
    stop(name(me.id) + " left the kernel, and others wait for it at the barrier at " + text(block.barrier));
  }
  if (machine.arrived > 0 && !block.arrived) {
    stop(name(me.id) + " left the kernel, and others wait for it at the grid barrier at " +
         text(machine.grid_barrier));
  }
  Warp& warp = warp_of(me);
  for (const WarpOperation& operation : warp.operations) {
    if (operation.mask >> me.lane & 1) {
      stop(name(me.id) + " left the kernel, and lanes of its warp wait for it in " + operation.what + " at " +
           text(operation.site));
    }
  }
  warp.finished |= 1u << me.lane;
  ++block.finished;
  me.wait = Wait::over;
}

void thread_main() {
  machine.body(machine.params);
  leave();
  for (;;) yield();
}

// ---- the schedule

void reserve_stacks(std::size_t bytes) {
  Memory& stacks = machine.stacks;
  if (stacks.bytes >= bytes) return;
  if (stacks.base != nullptr) munmap(stacks.base, stacks.bytes);
  stacks = {};
  void* base =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  stacks = {static_cast<std::byte*>(base), bytes};
}

void start_block(Block& block, unsigned number, std::size_t slot) {
  const Shape& shape = machine.shape;
  const dim3 index(number % shape.grid.x, number / shape.grid.x % shape.grid.y,
                   number / shape.grid.x / shape.grid.y);
  block.number = number;
  block.finished = block.at_barrier = 0;
  block.arrived = false;
  block.with_grid = machine.opened;
  block.synchronised = ++machine.tick;
  constexpr std::size_t alignment = 128;
  block.shared.assign(shape.shared_bytes + alignment, std::byte{0xff});
  block.cells.assign(shape.shared_bytes / cell_bytes + 1, Cell());
  const auto address = reinterpret_cast<std::uintptr_t>(block.shared.data());
  block.shared_base = block.shared.data() + (alignment - address % alignment) % alignment;
  block.threads.resize(shape.threads);
  block.warps.resize((shape.threads + 31) / 32);
  for (std::size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    const unsigned lanes = std::min(32u, shape.threads - static_cast<unsigned>(32 * w));
    warp.block = &block;
    warp.threads = &block.threads[32 * w];
    warp.lanes = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    warp.finished = 0;
    warp.synchronised = machine.tick;
    warp.operations.clear();
  }
  for (unsigned t = 0; t < shape.threads; ++t) {
    Thread& thread = block.threads[t];
    thread.at = {dim3(t, 0, 0), index, dim3(shape.threads), shape.grid};
    thread.stack = machine.stacks.base + (slot * shape.threads + t) * stack_bytes;
    std::memcpy(thread.stack, &stack_mark, sizeof(stack_mark));
    thread.fiber = new_fiber(thread.stack + stack_bytes, thread_main);
    thread.block = &block;
    thread.id = number * threads_per_block + t;
    thread.lane = t % 32;
    thread.copies.clear();
    thread.copy_group = 0;
    make_ready(thread);
  }
}

// Runs the lanes of a warp that can run, each until it waits, from a random lane on.
void run_warp(Warp& warp) {
  const auto count = static_cast<unsigned>(__builtin_popcount(warp.lanes));
  const auto choice = static_cast<unsigned>(random_below(2 * count));
  for (unsigned i = 0; i < count && !machine.failed; ++i) {
    const unsigned step = (choice / 2 + i) % count;
    Thread& thread = warp.threads[choice % 2 ? count - 1 - step : step];
    if (thread.wait != Wait::nothing) continue;
    machine.current = &thread;
    running = &thread.at;
    hrmcore_switch_fiber(&machine.scheduler, thread.fiber);
  }
}

bool can_run(const Warp& warp) {
  for (unsigned lane = 0; lane < 32 && (warp.lanes >> lane & 1); ++lane) {
    if (warp.threads[lane].wait == Wait::nothing) return true;
  }
  return false;
}

std::string describe_wait(const Thread& thread) {
  switch (thread.wait) {
    case Wait::nothing:
      return "ready";
    case Wait::over:
      return "left the kernel";
    default:
      return std::string("waits in ") + thread.what + " at " + text(thread.site);
  }
}

std::string deadlock() {
  std::string message = "deadlock: no thread can go on";
  int lines = 0;
  for (const auto& block : machine.resident) {
    for (std::size_t first = 0; first < block->threads.size() && lines < 8;) {
      const std::string wait = describe_wait(block->threads[first]);
      std::size_t last = first;
      while (last + 1 < block->threads.size() && describe_wait(block->threads[last + 1]) == wait) ++last;
      message += "; block " + std::to_string(block->number) + " threads " + std::to_string(first) + "-" +
                 std::to_string(last) + ": " + wait;
      first = last + 1;
      ++lines;
    }
  }
  return message + " (kernel launched at " + text(machine.launch) + ")";
}

void run_blocks() {
  const unsigned total = blocks_of(machine.shape.grid);
  const bool together = machine.shape.cooperative;
  const unsigned at_once =
      together ? total : std::min(total, 1 + static_cast<unsigned>(random_below(most_blocks_at_once)));
  reserve_stacks(std::size_t{at_once} * machine.shape.threads * stack_bytes);
  unsigned started = 0;
  machine.resident.resize(at_once);
  for (unsigned slot = 0; slot < at_once; ++slot) {
    if (machine.resident[slot] == nullptr) machine.resident[slot] = std::make_unique<Block>();
    start_block(*machine.resident[slot], started++, slot);
  }
  while (!machine.ready.empty()) {
    const std::size_t pick = random_below(machine.ready.size());
    Warp& warp = *machine.ready[pick];
    run_warp(warp);
    if (machine.failed) return;
    if (!can_run(warp)) {
      warp.queued = false;
      machine.ready[pick] = machine.ready.back();
      machine.ready.pop_back();
    }
    if (warp.block->finished == machine.shape.threads && started < total) {
      const auto slot = static_cast<std::size_t>(
          std::find_if(machine.resident.begin(), machine.resident.end(),
                       [&](const auto& block) { return block.get() == warp.block; }) -
          machine.resident.begin());
      start_block(*warp.block, started++, slot);
    }
  }
  for (const auto& block : machine.resident) {
    if (block->finished < machine.shape.threads) {
      machine.failed = true;
      machine.message = deadlock();
      return;
    }
  }
}

const char* refuse(const std::string& message) {
  machine.message = message + " (kernel launched at " + text(machine.launch) + ")";
  return machine.message.c_str();
}

thread_local int device_of_thread = 0;

}  // namespace

int current_device() { return device_of_thread; }

bool set_device(int device) {
  if (device < 0 || device >= most_devices) return false;
  device_of_thread = device;
  return true;
}

std::uint64_t take_launches_on(int device) {
  const std::lock_guard lock(machine.one_launch);
  return std::exchange(machine.launches_on[device], 0);
}

std::size_t shared_bytes_of_device() { return machine.shared_bytes[device_of_thread]; }

void set_shared_bytes(int device, std::size_t bytes) {
  machine.shared_bytes[device] = std::min(bytes, max_shared_bytes);
}

void set_seed(std::uint64_t seed) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  machine.seed = seed;
}

Counters take_counters() {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  const Counters counters = machine.counters;
  machine.counters = {};
  return counters;
}

const char* run(const Shape& shape, void (*body)(const void* params), const void* params, Site site) {
  const std::lock_guard<std::mutex> lock(machine.one_launch);
  machine.launch = site;
  machine.shape = shape;
  if (shape.threads < 1 || shape.threads > 1024) return refuse("a block must have 1 to 1024 threads");
  if (shape.shared_bytes > max_shared_bytes)
    return refuse("a block can have 227 KiB of shared memory at most");
  if (blocks_of(shape.grid) == 0 || shape.grid.y > 65535 || shape.grid.z > 65535) {
    return refuse("a grid must have at least one block, and at most 65535 in y and z");
  }
  machine.body = body;
  machine.params = params;
  machine.random = 0x9e3779b97f4a7c15u * (machine.seed + 1) | 1;
  machine.failed = false;
  machine.arrived = 0;
  if (machine.tick >= 1u << 29 || machine.global.bytes() > most_shadow_bytes) {
    machine.global.forget();
    machine.resident.clear();
    machine.tick = 0;
  }
  machine.opened = ++machine.tick;  // all of the launch comes after what was before
  ++machine.counters.launches;
  ++machine.launches_on[device_of_thread];
  for (auto& block : machine.resident) {
    for (Warp& warp : block->warps) warp.queued = false;
  }
  machine.ready.clear();
  run_blocks();
  running = nullptr;
  return machine.failed ? machine.message.c_str() : nullptr;
}

void fail(const char* what, Site site) { stop_here(what, site); }

void block_barrier(Site site) {
  Thread& me = *machine.current;
  Block& block = *me.block;
  if (block.finished > 0)
    stop_here("waits at a barrier that a thread of its block left without reaching", site);
  if (block.at_barrier == 0) block.barrier = site;
  if (block.barrier.line != site.line || std::strcmp(block.barrier.file, site.file) != 0) {
    stop_here("divergent barrier: others of its block wait at " + text(block.barrier), site);
  }
  me.wait = Wait::block;
  me.what = "__syncthreads";
  me.site = site;
  if (++block.at_barrier == block.threads.size()) {
    release_block(block);
  } else {
    yield();
  }
}

void grid_state_read(Site site) {
  if (machine.current->block->arrived) {
    stop_here("reads the state of a grid barrier that it has arrived at: it may have opened already", site);
  }
}

void grid_arrive(Site site) {
  if (!machine.shape.cooperative) stop_here("a grid barrier in a launch that is not cooperative", site);
  for (const auto& block : machine.resident) {
    if (block->finished > 0) stop_here("arrives at a grid barrier that a block left without reaching", site);
  }
  Block& block = *machine.current->block;
  if (block.arrived) stop_here("arrives at a grid barrier twice without having waited", site);
  block_barrier(site);
  if (block.arrived) return;  // the first thread of the block to go on has done the rest
  machine.grid_barrier = site;
  if (machine.arrived == 0) machine.window_begin = machine.window_tick = machine.tick + window_room;
  if (machine.tick >= machine.window_begin)
    stop_here("more synchronisations than the emulator can order", site);
  block.arrived = true;
  block.arrival = machine.openings;
  if (++machine.arrived == blocks_of(machine.shape.grid)) open_grid();
}

void grid_wait(Site site) {
  Thread& me = *machine.current;
  Block& block = *me.block;
  if (!block.arrived) stop_here("waits at a grid barrier that its block has not arrived at", site);
  if (still_closed(block)) {
    me.wait = Wait::grid;
    me.what = "a grid barrier";
    me.site = site;
    yield();
  }
  block_barrier(site);
  block.arrived = false;
  block.with_grid = machine.opened;
}

void warp_operation(const char* what, unsigned mask, const void* in, void* out, Combine combine, Site site) {
  Thread& me = *machine.current;
  Warp& warp = warp_of(me);
  if (!(mask >> me.lane & 1))
    stop_here(std::string(what) + " with a mask that leaves out the calling lane", site);
  if (mask & ~warp.lanes) stop_here(std::string(what) + " with a mask of lanes that do not exist", site);
  if (mask & warp.finished) stop_here(std::string(what) + " with a mask of lanes that have left", site);
  auto operation = std::find_if(warp.operations.begin(), warp.operations.end(),
                                [mask](const WarpOperation& o) { return (o.mask & mask) != 0; });
  if (operation == warp.operations.end()) {
    warp.operations.push_back({what, mask, 0, site, combine, {}, {}});
    operation = warp.operations.end() - 1;
  }
  if (operation->mask != mask || operation->site.line != site.line ||
      std::strcmp(operation->site.file, site.file) != 0 || std::strcmp(operation->what, what) != 0) {
    stop_here(std::string("divergent warp: ") + what + " here, while lanes of its mask wait in " +
                  operation->what + " at " + text(operation->site) + ", or with another mask",
              site);
  }
  operation->arrived |= 1u << me.lane;
  operation->in[me.lane] = in;
  operation->out[me.lane] = out;
  me.wait = Wait::warp;
  me.what = what;
  me.site = site;
  if (operation->arrived != mask) {
    yield();
    return;
  }
  if (combine != nullptr) {
    combine(operation->in, operation->out);
  } else if (mask == (warp.lanes & ~warp.finished)) {
    warp.synchronised = ++tick_of(*me.block);
  }
  warp.operations.erase(operation);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) make_ready(warp.threads[lane]);
  }
}

std::byte* shared_memory() { return machine.current->block->shared_base; }

}  // namespace hrmcore::emulator

unsigned __ballot_sync(unsigned mask, int vote, hrmcore::emulator::Site site) {
  unsigned result = 0;
  hrmcore::emulator::warp_operation(
      "__ballot_sync", mask, &vote, &result,
      [](const void* const(&in)[32], void* const(&out)[32]) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
          if (in[lane] != nullptr && *static_cast<const int*>(in[lane]) != 0) votes |= 1u << lane;
        }
        for (void* target : out) {
          if (target != nullptr) *static_cast<unsigned*>(target) = votes;
        }
      },
      site);
  return result;
}
