#include "engine/matrix_product.h"

#include "engine/fetching.h"
#include "engine/matrix_unit.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

// The chunks of a call in their order: all panels of the first groups, then of the next.
struct Walk {
  const MatrixProduct& args;
  std::int64_t panels;

  std::int64_t steps() const {
    return (args.weights.groups() + tile_chunk_groups - 1) / tile_chunk_groups * panels;
  }
  std::int64_t first_group(std::int64_t step) const { return step / panels * tile_chunk_groups; }
  std::int64_t groups(std::int64_t step) const { return args.x.chunk_tiles(step / panels); }
  const std::byte* weights(std::int64_t step) const {
    return args.weights.data + (args.panel_begin + step % panels) * args.weights.panel_bytes() +
           first_group(step) * group_bytes(Packing::bf16);
  }
};

void walk_chunks(const MatrixProduct& args) {
  const Walk walk{args, args.panel_end - args.panel_begin};
  const std::int64_t bands = args.band_end - args.band_begin, pairs = (bands + 1) / 2, steps = walk.steps();
  std::byte* rooms[2] = {args.scratch, args.scratch + matrix_scratch_bytes / 2};
  Widening widening;
  set_order(widening);
  const auto begin_widening = [&](std::int64_t step) {
    widening.from = walk.weights(step);
    widening.to = rooms[step % 2];
    widening.groups = walk.groups(step);
    widening.next = 0;
  };
  begin_widening(0);
  widen_to<Packing::bf16>(widening, widening.quarters());
  for (std::int64_t step = 0; step < steps; ++step) {
    settle_memory();
    const std::int64_t panel = step % walk.panels, groups = walk.groups(step);
    if (step + 1 < steps) begin_widening(step + 1);
    const std::int64_t multiplications = 2 * pairs * groups;
    const std::int64_t pace = (widening.quarters() + multiplications - 1) / multiplications;
    Fetching ahead;
    if (step + 2 < steps) {
      ahead.next = walk.weights(step + 2);
      ahead.end = ahead.next + walk.groups(step + 2) * group_bytes(Packing::bf16);
    }
    const std::int64_t lines = ((ahead.end - ahead.next) / 64 + multiplications - 1) / multiplications;
    const auto meanwhile = [&]() __attribute__((always_inline)) {
      fetch_lines(ahead, lines);
      const std::int64_t end = widening.next + pace;
      widen_to<Packing::bf16>(widening, end < widening.quarters() ? end : widening.quarters());
    };
    for (int half = 0; half < 2; ++half) {
      Block block{args.x.tile(args.band_begin, step / walk.panels),
                  rooms[step % 2] + 2 * half * groups * tile_bytes,
                  groups * tile_bytes,
                  groups * tile_bytes,
                  groups,
                  args.sums + (panel * bands * panel_tiles + 2 * half) * tile_floats,
                  panel_tiles * tile_floats,
                  step >= walk.panels};
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        if (2 * pair + 1 < bands) {
          multiply_block<2>(block, meanwhile);
        } else {
          multiply_block<1>(block, meanwhile);
        }
        block.x += 2 * block.x_step;
        block.sums += 2 * block.sums_step;
      }
    }
  }
}

}  // namespace

void matrix_product(const MatrixProduct& args) noexcept {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  walk_chunks(args);
  _tile_release();
  settle_memory();
}

}  // namespace hrmcore::HRMCORE_ISA
