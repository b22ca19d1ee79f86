#include "gemm/row_tiles.h"

#include "gemm/lanes.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

// The sums of a row in a panel: column 16 i at 256 i floats.
HRMCORE_INLINE const float* sums_of(const float* sums, std::int64_t panel, std::int64_t rows,
                                    std::int64_t row) {
  return sums + (panel * bands_of(rows) + row / band_rows) * panel_tiles * tile_floats +
         row % band_rows * lanes;
}

// A row's columns of one chunk to its tiles; `x` has zeros up to the end of the last of them.
HRMCORE_INLINE void put_bf16(const TileRows& y, std::int64_t row, std::int64_t chunk, const float* x,
                             vfloat factor) {
  std::byte* to = y.line(row, chunk);
  for (std::int64_t tile = 0; tile < y.chunk_tiles(chunk); ++tile, x += 2 * lanes, to += tile_bytes)
    put_pair(load(x) * factor, load(x + lanes) * factor, to);
}

HRMCORE_INLINE void put_int8(const TileRows& y, std::int64_t row, std::int64_t chunk, const float* x,
                             vfloat factor) {
  const std::int64_t tiles = y.chunk_tiles(chunk);
  vfloat top = {};
  for (std::int64_t c = 0; c < 4 * tiles; ++c)
    top = max(top, (vfloat)((vint)load(x + c * lanes) & 0x7fffffff));
  const float largest = max(top) * factor[0];
  y.scales(row / band_rows, chunk)[row % band_rows] = largest / 127.0f;
  const vfloat inverse = factor * (largest > 0 ? 127.0f / largest : 0.0f);
  std::byte* to = y.line(row, chunk);
  for (std::int64_t tile = 0; tile < tiles; ++tile, to += tile_bytes) {
    for (int part = 0; part < 4; ++part, x += lanes) {
      const vbyte bytes = __builtin_convertvector(round_product(load(x), inverse), vbyte);
      __builtin_memcpy(to + part * lanes, &bytes, sizeof(bytes));
    }
  }
}

HRMCORE_INLINE void put_chunk(const TileRows& y, std::int64_t row, std::int64_t chunk, const float* x,
                              vfloat factor) {
  y.packing == Packing::int8 ? put_int8(y, row, chunk, x, factor) : put_bf16(y, row, chunk, x, factor);
}

}  // namespace

void normalise_tiles(const NormaliseTiles& args) noexcept {
  for (std::int64_t row = args.row_begin; row < args.row_end; ++row) {
    const auto [x, scale] = normalised_row(args, row);
    for (std::int64_t chunk = 0; chunk < args.y.chunks(); ++chunk)
      put_chunk(args.y, row, chunk, x + chunk * tile_chunk_columns, scale);
  }
}

void round_tiles(const RoundTiles& args) noexcept {
  for (std::int64_t row = args.row_begin; row < args.row_end; ++row) {
    for (std::int64_t chunk = 0; chunk < args.y.chunks(); ++chunk)
      put_chunk(args.y, row, chunk, args.x + row * args.stride + chunk * tile_chunk_columns, splat(1.0f));
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
  constexpr std::int64_t chunk_panels = tile_chunk_columns / (panel_rows / 2);
  alignas(64) float x[tile_chunk_columns] = {};
  for (std::int64_t row = 0; row < args.rows; ++row) {
    for (std::int64_t panel = 0; panel < args.panels; ++panel) {
      const float* sums = sums_of(args.sums, panel, args.rows, row);
      float* to = x + panel % chunk_panels * 2 * lanes;
      for (int i = 0; i < 2; ++i) {
        const vfloat gate = load(sums + i * tile_floats);
        store(to + i * lanes, gate * sigmoid(gate) * load(sums + (2 + i) * tile_floats));
      }
      if (panel % chunk_panels == chunk_panels - 1 || panel == args.panels - 1) {
        if (panel % 2 == 0)
          __builtin_memset(to + 2 * lanes, 0, 2 * lanes * sizeof(float));  // the other half of an int8 tile
        put_chunk(args.y, args.first_row + row, args.first_chunk + panel / chunk_panels, x, splat(1.0f));
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
