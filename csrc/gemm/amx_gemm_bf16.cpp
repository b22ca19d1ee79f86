#include "gemm/tile_gemm.h"

#include "gemm/chunk_walk.h"
#include "gemm/tile_unit.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

void walk_chunks(const TileGemm& args) {
  const ChunkWalk walk{args};
  const std::int64_t bands = args.bands(), pairs = (bands + 1) / 2, steps = walk.steps;
  std::byte* rooms[2] = {args.scratch, args.scratch + tile_scratch_bytes / 2};
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
    const std::int64_t panel = walk.panel(step), groups = walk.groups(step);
    if (step + 1 < steps) begin_widening(step + 1);
    const std::int64_t multiplications = 2 * pairs * groups;
    const std::int64_t pace = (widening.quarters() + multiplications - 1) / multiplications;
    PrefetchRange ahead = walk.prefetch(step + 2);
    const std::int64_t lines = ((ahead.end - ahead.next) / 64 + multiplications - 1) / multiplications;
    const auto meanwhile = [&]() __attribute__((always_inline)) {
      prefetch_lines(ahead, lines);
      const std::int64_t end = widening.next + pace;
      widen_to<Packing::bf16>(widening, end < widening.quarters() ? end : widening.quarters());
    };
    for (int half = 0; half < 2; ++half) {
      Block block{args.x.tile(args.band_begin, walk.chunk(step)),
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

void tile_gemm_bf16(const TileGemm& args) noexcept {
  const TileUnit unit;
  walk_chunks(args);
  settle_memory();
}

}  // namespace hrmcore::HRMCORE_ISA
