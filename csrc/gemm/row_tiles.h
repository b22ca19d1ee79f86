// Rows of activations as a GEMM in tiles reads them (tile_gemm.h), and what happens to them between two GEMMs.
// T tokens, D width, F ffn width.
//
// A tile is 16 rows of 64 bytes, 1 KiB in one piece: 32 columns in bfloat16 or 64 in int8; 16 rows are a
// band. The tiles that a GEMM reads together lie together, the last chunk with what is left:
//
//   activations    [chunk of 256 columns][band][tile][16 rows][64 bytes]; int8 as x, or x + 128 where the
//                  instruction set multiplies unsigned bytes by signed ones (dots.h)
//   their scales   [chunk][band][16 rows] float32, behind the tiles: max |x| / 127 of a chunk, int8 only
//   sums           [panel][band][4 tiles][16 rows][16 columns] float32
#pragma once

#include "core/isa.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

constexpr std::int64_t band_rows = 16;
constexpr std::int64_t tile_line_bytes = 64;
constexpr std::int64_t tile_bytes = band_rows * tile_line_bytes;
constexpr std::int64_t panel_tiles = panel_rows / band_rows;
constexpr std::int64_t tile_floats = band_rows * band_rows;
// Half a panel of a chunk stays in the first-level cache while the bands of x stream past it.
constexpr std::int64_t tile_chunk_columns = 256;
constexpr std::int64_t tile_chunk_groups = tile_chunk_columns / group_columns;

[[maybe_unused]] static std::int64_t bands_of(std::int64_t rows) {
  return (rows + band_rows - 1) / band_rows;
}

struct TileRows {
  std::byte* data;
  Packing packing;  // bf16 or int8
  std::int64_t bands, columns;

  std::int64_t tile_columns() const { return packing == Packing::int8 ? 64 : 32; }
  std::int64_t tiles() const { return (columns + tile_columns() - 1) / tile_columns(); }
  std::int64_t chunks() const { return (columns + tile_chunk_columns - 1) / tile_chunk_columns; }
  std::int64_t chunk_tiles(std::int64_t chunk) const {
    const std::int64_t whole = tile_chunk_columns / tile_columns(), left = tiles() - chunk * whole;
    return left < whole ? left : whole;
  }
  std::int64_t scale_bytes() const {
    return packing == Packing::int8 ? chunks() * bands * band_rows * std::int64_t{sizeof(float)} : 0;
  }
  std::int64_t bytes() const { return bands * tiles() * tile_bytes + scale_bytes(); }
  // The first tile of a chunk in a band.
  std::byte* tile(std::int64_t band, std::int64_t chunk) const {
    const std::int64_t whole = tile_chunk_columns / tile_columns();
    return data + (chunk * whole * bands + band * chunk_tiles(chunk)) * tile_bytes;
  }
  std::byte* line(std::int64_t row, std::int64_t chunk) const {
    return tile(row / band_rows, chunk) + row % band_rows * tile_line_bytes;
  }
  // int8: the scales of a band in a chunk, [16].
  float* scales(std::int64_t band, std::int64_t chunk) const {
    return reinterpret_cast<float*>(data + bands * tiles() * tile_bytes) + (chunk * bands + band) * band_rows;
  }
};

// y = x / sqrt(mean(x^2) + eps), rounded to what the tiles hold; with `add`, sum = x + add first and then y
// of it. Strides are multiples of 64 and rows zero beyond their width. Moves 3 D floats a row.
struct NormaliseTiles {
  const float* x;
  const float* add;  // or null
  float* sum;        // written; null exactly when add is
  std::int64_t width, stride;
  TileRows y;  // written
  std::int64_t row_begin, row_end;
  float eps;
};

// x rounded to what the tiles hold. Moves 1.25 or 1.5 floats a column.
struct RoundTiles {
  const float* x;
  std::int64_t stride;
  TileRows y;  // written
  std::int64_t row_begin, row_end;
};

// Sums of a GEMM, copied or added to rows.
struct UnloadTiles {
  const float* sums;  // [panels][bands][4][16][16]
  std::int64_t panels, rows;
  float* out;  // [rows][64 panels]
  std::int64_t out_stride;
  bool add;
};

// Panels of 32 gate and 32 up sums to 32 columns of silu(gate) * up each; whole chunks, or the last ones.
struct SwigluTiles {
  const float* sums;  // [panels][bands][4][16][16]
  std::int64_t panels, rows;
  TileRows y;                           // written
  std::int64_t first_row, first_chunk;  // of y
};

HRMCORE_DECLARE_TILE_KERNEL(normalise_tiles, NormaliseTiles)
HRMCORE_DECLARE_TILE_KERNEL(round_tiles, RoundTiles)
HRMCORE_DECLARE_TILE_KERNEL(unload_tiles, UnloadTiles)
HRMCORE_DECLARE_TILE_KERNEL(swiglu_tiles, SwigluTiles)

}  // namespace hrmcore
