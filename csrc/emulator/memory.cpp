#include <algorithm>
#include <cstring>
#include <string>

#include "emulator/machine.h"

namespace hrmcore::emulator {
namespace {

Observer observer(const Thread& thread) {
  return {thread.id, tick_of(*thread.block), thread.block->warps[thread.at.thread.x / 32].synchronised,
          thread.block->synchronised, thread.block->with_grid};
}

void report(const Conflict& conflict, bool write, const std::string& place, Site site) {
  const std::string mine = write ? "writes " : "reads ";
  const std::string theirs = conflict.with_write ? " wrote" : " read";
  stop_here("race: " + mine + place + ", which " + name(conflict.other) + theirs +
                " with no barrier in between that both passed",
            site);
}

}  // namespace

void shared_access(const void* address, std::size_t bytes, bool write, Site site) {
  Thread& me = *machine.current;
  Block& block = *me.block;
  const std::ptrdiff_t offset = static_cast<const std::byte*>(address) - block.shared_base;
  if (offset < 0 || offset + bytes > machine.shape.shared_bytes) {
    stop_here("shared memory out of bounds: byte " + std::to_string(offset) + " of " +
                  std::to_string(machine.shape.shared_bytes),
              site);
  }
  if (offset % bytes != 0)
    stop_here("misaligned access to shared memory, at byte " + std::to_string(offset), site);
  const Observer who = observer(me);
  for (std::size_t cell = offset / cell_bytes; cell <= (offset + bytes - 1) / cell_bytes; ++cell) {
    const Conflict conflict = write ? block.cells[cell].write(who) : block.cells[cell].read(who);
    if (conflict.found) {
      report(conflict, write, "byte " + std::to_string(cell * cell_bytes) + " of shared memory", site);
    }
  }
}

void global_access(const void* address, std::size_t bytes, bool write, Site site) {
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  if (first % bytes != 0) stop_here("misaligned access to global memory", site);
  (write ? machine.counters.bytes_written : machine.counters.bytes_read) += bytes;
  const Observer who = observer(*machine.current);
  Cell* cells = machine.global.at(first);
  for (std::size_t cell = 0; cell < (bytes + cell_bytes - 1) / cell_bytes; ++cell) {
    if (!write && cells[cell].unread(who)) machine.counters.bytes_read_first += std::min(bytes, cell_bytes);
    const Conflict conflict = write ? cells[cell].write(who) : cells[cell].read(who);
    if (conflict.found) report(conflict, write, "global memory", site);
  }
}

void copy_async(void* shared, const void* global, std::size_t bytes, std::size_t filled, Site site) {
  Thread& me = *machine.current;
  shared_access(shared, bytes, true, site);
  if (reinterpret_cast<std::uintptr_t>(global) % bytes != 0) stop_here("misaligned source of cp.async", site);
  for (std::size_t read = 0; read < filled; read += cell_bytes) {
    global_access(static_cast<const std::byte*>(global) + read, cell_bytes, false, site);
  }
  std::memset(shared, 0xff, bytes);
  me.copies.push_back(
      {static_cast<std::byte*>(shared), static_cast<const std::byte*>(global), bytes, filled, me.copy_group});
}

void commit_copies() { ++machine.current->copy_group; }

void wait_for_copies(unsigned groups_left, Site site) {
  Thread& me = *machine.current;
  me.site = site;
  const auto landed = std::find_if(me.copies.begin(), me.copies.end(), [&](const Copy& copy) {
    return copy.group + groups_left >= me.copy_group;
  });
  for (auto copy = me.copies.begin(); copy != landed; ++copy) {
    shared_access(copy->shared, copy->bytes, true, site);
    std::memset(copy->shared, 0, copy->bytes);
    std::memcpy(copy->shared, copy->global, copy->filled);
  }
  me.copies.erase(me.copies.begin(), landed);
}

}  // namespace hrmcore::emulator
