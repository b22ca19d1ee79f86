#include "emulator/races.h"

namespace hrmcore::emulator {

Cell::Readers Cell::relation(ThreadId a, ThreadId b) {
  if (a == b) return one;
  if (a / lanes_per_warp == b / lanes_per_warp) return of_warp;
  if (a / threads_per_block == b / threads_per_block) return of_block;
  return of_grid;
}

bool Cell::before(std::uint32_t tick, Readers relation, const Observer& who) {
  switch (relation) {
    case one:
      return true;
    case of_warp:
      return tick < who.with_warp;
    case of_block:
      return tick < who.with_block;
    case of_grid:
      break;
  }
  return tick < who.with_grid;
}

Conflict Cell::read(const Observer& who) {
  const Readers to_writer = relation(writer_, who.id);
  if (!before(write_tick_, to_writer, who)) return {true, true, writer_};
  const Readers to_reader = relation(reader_, who.id);
  const Readers widest = to_reader > readers_ ? to_reader : static_cast<Readers>(readers_);
  if (before(read_tick_, widest, who)) {
    reader_ = who.id;
    readers_ = one;
  } else {
    readers_ = widest & 3u;
  }
  read_tick_ = who.now & 0x3fffffffu;
  return {};
}

Conflict Cell::write(const Observer& who) {
  if (!before(write_tick_, relation(writer_, who.id), who)) return {true, true, writer_};
  const Readers to_reader = relation(reader_, who.id);
  const Readers widest = to_reader > readers_ ? to_reader : static_cast<Readers>(readers_);
  if (!before(read_tick_, widest, who)) return {true, false, reader_};
  writer_ = who.id;
  write_tick_ = who.now;
  return {};
}

Cell* GlobalCells::at(std::uintptr_t address) {
  const std::uintptr_t page = address / page_bytes;
  Recent& recent = recent_[page % recent_pages];
  if (recent.page != page || recent.cells == nullptr) {
    std::unique_ptr<Cell[]>& cells = pages_[page];
    if (cells == nullptr) cells = std::make_unique<Cell[]>(page_bytes / cell_bytes);
    recent = {page, cells.get()};
  }
  return recent.cells + address % page_bytes / cell_bytes;
}

void GlobalCells::forget() {
  pages_.clear();
  for (Recent& recent : recent_) recent = {};
}

}  // namespace hrmcore::emulator
