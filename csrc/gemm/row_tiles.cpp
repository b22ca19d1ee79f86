#include "gemm/row_tiles.h"

#include "gemm/dots.h"
#include "gemm/lanes.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr int tile_columns = 16;  // of sums

// The sums of a row in a panel: column 16 i at 256 i floats.
HRMCORE_INLINE const float* sums_of(const float* sums, std::int64_t panel, std::int64_t rows,
                                    std::int64_t row) {
  return sums + (panel * bands_of(rows) + row / band_rows) * panel_tiles * tile_floats +
         row % band_rows * tile_columns;
}

// A row's columns of one chunk to its tiles; `x` has zeros up to the end of the last of them.
#if defined(HRMCORE_AVX512_BF16)
HRMCORE_INLINE void put_bf16(const TileRows& y, std::int64_t row, std::int64_t chunk, const float* x,
                             vfloat factor) {
  std::byte* to = y.line(row, chunk);
  for (std::int64_t tile = 0; tile < y.chunk_tiles(chunk); ++tile, x += 2 * lanes, to += tile_bytes)
    put_pair(load(x) * factor, load(x + lanes) * factor, to);
}
#endif

HRMCORE_INLINE void put_int8(const TileRows& y, std::int64_t row, std::int64_t chunk, const float* x,
                             vfloat factor) {
  const std::int64_t tiles = y.chunk_tiles(chunk);
  vfloat top = {};
  for (std::int64_t c = 0; c < tiles * tile_line_bytes; c += lanes)
    top = max(top, (vfloat)((vint)load(x + c) & 0x7fffffff));
  const float largest = max(top) * factor[0];
  y.scales(row / band_rows, chunk)[row % band_rows] = largest / 127.0f;
  const vfloat inverse = factor * (largest > 0 ? 127.0f / largest : 0.0f);
  std::byte* to = y.line(row, chunk);
  for (std::int64_t tile = 0; tile < tiles; ++tile, to += tile_bytes) {
    for (int c = 0; c < tile_line_bytes; c += lanes, x += lanes) {
      const vint q = round_product(load(x), inverse);
      const vbyte bytes = __builtin_convertvector(unsigned_tiles ? q ^ 0x80 : q, vbyte);
      __builtin_memcpy(to + c, &bytes, sizeof(bytes));
    }
  }
}

HRMCORE_INLINE void put_chunk(const TileRows& y, std::int64_t row, std::int64_t chunk, const float* x,
                              vfloat factor) {
#if defined(HRMCORE_AVX512_BF16)
  if (y.packing == Packing::bf16) return put_bf16(y, row, chunk, x, factor);
#endif
  put_int8(y, row, chunk, x, factor);
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
      for (int tile = 0; tile < panel_tiles; ++tile, sums += tile_floats, out += tile_columns) {
        for (int c = 0; c < tile_columns; c += lanes)
          store(out + c, args.add ? load(out + c) + load(sums + c) : load(sums + c));
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
      float* to = x + panel % chunk_panels * group_columns;
      for (int c = 0; c < group_columns; c += lanes) {
        const float* gates = sums + c / tile_columns * tile_floats + c % tile_columns;
        const vfloat gate = load(gates);
        store(to + c, gate * sigmoid(gate) * load(gates + 2 * tile_floats));
      }
      if (panel % chunk_panels == chunk_panels - 1 || panel == args.panels - 1) {
        if (panel % 2 == 0)
          __builtin_memset(to + group_columns, 0,
                           group_columns * sizeof(float));  // the other half of an int8 tile
        put_chunk(args.y, args.first_row + row, args.first_chunk + panel / chunk_panels, x, splat(1.0f));
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA
