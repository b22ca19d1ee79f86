#include "engine/tiles.h"

#include "engine/matrix_unit.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

// The sums of a row in a panel: column 16 i at 256 i floats.
HRMCORE_INLINE const float* sums_of(const float* sums, std::int64_t panel, std::int64_t rows,
                                    std::int64_t row) {
  return sums + (panel * bands_of(rows) + row / band_rows) * panel_tiles * tile_floats +
         row % band_rows * lanes;
}

}  // namespace

void normalise_tiles(const NormaliseTiles& args) noexcept {
  for (std::int64_t row = args.row_begin; row < args.row_end; ++row) {
    const auto [x, scale] = normalised_row(args, row);
    for (std::int64_t group = 0; group < args.y.groups; ++group) {
      const float* from = x + group * group_columns;
      put_pair(load(from) * scale, load(from + lanes) * scale, args.y.line(row, group));
    }
  }
}

void round_tiles(const RoundTiles& args) noexcept {
  for (std::int64_t row = args.row_begin; row < args.row_end; ++row) {
    for (std::int64_t group = 0; group < args.y.groups; ++group) {
      const float* from = args.x + row * args.stride + group * group_columns;
      put_pair(load(from), load(from + lanes), args.y.line(row, group));
    }
  }
}

void unload_tiles(const UnloadTiles& args) noexcept {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    for (std::int64_t panel = 0; panel < args.panels; ++panel) {
      const float* sums = sums_of(args.sums, panel, args.rows, row);
      float* out = args.out + row * args.out_stride + panel * panel_rows;
      for (int i = 0; i < panel_tiles; ++i, sums += tile_floats, out += lanes) {
        store(out, args.add ? load(out) + load(sums) : load(sums));
      }
    }
  }
}

void swiglu_tiles(const SwigluTiles& args) noexcept {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    for (std::int64_t panel = 0; panel < args.panels; ++panel) {
      const float* sums = sums_of(args.sums, panel, args.rows, row);
      const vfloat gate[2] = {load(sums), load(sums + tile_floats)};
      const vfloat up[2] = {load(sums + 2 * tile_floats), load(sums + 3 * tile_floats)};
      put_pair(gate[0] * sigmoid(gate[0]) * up[0], gate[1] * sigmoid(gate[1]) * up[1],
               args.y.line(args.first_row + row, args.first_group + panel));
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
