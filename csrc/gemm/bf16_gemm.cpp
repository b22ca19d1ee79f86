#include "gemm/chunk_walk.h"
#include "gemm/tile_gemm.h"
#include "gemm/tile_unit.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr int vectors = 2;  // half a panel's breadth of a chunk, 16 KiB, stays in the first-level cache
constexpr int tokens = 8;   // half a band

}  // namespace

// Packed bf16 weights are pairs of columns as the instruction wants them, so nothing is unpacked.
void tile_gemm_bf16(const TileGemm& args) noexcept {
  const ChunkWalk walk{args};
  const std::int64_t bands = args.bands();
  for (std::int64_t step = 0; step < walk.steps; ++step) {
    const std::int64_t groups = walk.groups(step);
    const std::byte* x = args.x.tile(args.band_begin, walk.chunk(step));
    float* sums = args.sums + walk.panel(step) * bands * panel_tiles * tile_floats;
    PrefetchRange ahead = walk.prefetch(step + 1);
    const std::int64_t turns = panel_tiles / vectors * ((args.rows + tokens - 1) / tokens) * groups;
    const std::int64_t lines = ((ahead.end - ahead.next) / 64 + turns - 1) / turns;
    for (int first = 0; first < panel_tiles; first += vectors) {
      const std::byte* w = walk.weights(step) + first * tile_line_bytes;
      for (std::int64_t row = 0; row < args.rows; row += tokens) {
        const std::int64_t band = row / band_rows, line = row % band_rows;
        multiply_eight(x + band * groups * tile_bytes + line * tile_line_bytes, w, tile_line_bytes,
                       slab_bytes, groups, sums + (band * panel_tiles + first) * tile_floats + line * lanes,
                       step >= walk.panels,
                       [&]() __attribute__((always_inline)) { prefetch_lines(ahead, lines); });
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
