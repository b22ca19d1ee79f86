#include "gemm/chunk_walk.h"
#include "gemm/lanes.h"
#include "gemm/tile_gemm.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr int vectors = 2;  // half a panel's breadth of a chunk, 16 KiB, stays in the first-level cache
constexpr int tokens = 8;   // half a band: 16 sums, more than the multiplication's latency needs

// acc + both products of each lane's pair, in float32.
HRMCORE_INLINE vfloat dot2(vfloat acc, vint w, vint x) {
  return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}

// Rows of x by `vectors` vectors of a chunk's rows: 16 products, 2 loads and 16 broadcasts for 512 pairs.
void multiply_tile(const std::byte* w, const std::byte* x, std::int64_t groups, float* sums, bool accumulate,
                   PrefetchRange& ahead, std::int64_t lines) {
  vfloat acc[tokens][vectors] = {};
  if (accumulate) {
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[t][v] = load(sums + v * tile_floats + t * lanes);
    }
  }
  for (std::int64_t group = 0; group < groups; ++group, x += tile_bytes) {
    prefetch_lines(ahead, lines);
#pragma GCC unroll 2
    for (int pair = 0; pair < group_columns / 2; ++pair, w += slab_bytes) {
      vint weight[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) weight[v] = load_bits(w + v * tile_line_bytes);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const vint both = splat_bits(load_cell(x + t * tile_line_bytes + 4 * pair));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) acc[t][v] = dot2(acc[t][v], weight[v], both);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(sums + v * tile_floats + t * lanes, acc[t][v]);
  }
}

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
        multiply_tile(w, x + band * groups * tile_bytes + line * tile_line_bytes, groups,
                      sums + (band * panel_tiles + first) * tile_floats + line * lanes, step >= walk.panels,
                      ahead, lines);
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
