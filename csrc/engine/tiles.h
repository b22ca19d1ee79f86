// Rows of bfloat16 activations as the matrix unit reads them, and what happens to them between two of its
// products. T tokens, D width, F ffn width.
//
// A tile is 16 rows of 32 columns (one group), 1 KiB in one piece; 16 rows are a band. The tiles that a
// product reads together lie together: [chunk of 8 groups][band][group][16 rows][32 columns], the last chunk
// with what is left. Sums come as tiles of 16 rows by 16 columns in float32: [panel][band][4 tiles][16][16].
#pragma once

#include "core/isa.h"
#include "engine/packed.h"

namespace hrmcore {

constexpr std::int64_t band_rows = 16;
constexpr std::int64_t tile_line_bytes = 64;
constexpr std::int64_t tile_bytes = band_rows * tile_line_bytes;
// Half a panel of a chunk stays in the first-level cache while the bands of x stream past it.
constexpr std::int64_t tile_chunk_groups = 8;

[[maybe_unused]] static std::int64_t bands_of(std::int64_t rows) {
  return (rows + band_rows - 1) / band_rows;
}

struct TileRows {
  std::byte* data;
  std::int64_t bands, groups;

  std::int64_t bytes() const { return bands * groups * tile_bytes; }
  std::int64_t chunk_groups(std::int64_t chunk) const {
    const std::int64_t left = groups - chunk * tile_chunk_groups;
    return left < tile_chunk_groups ? left : tile_chunk_groups;
  }
  std::byte* tile(std::int64_t band, std::int64_t group) const {
    const std::int64_t chunk = group / tile_chunk_groups;
    return data +
           (chunk * tile_chunk_groups * bands + band * chunk_groups(chunk) + group % tile_chunk_groups) *
               tile_bytes;
  }
  std::byte* line(std::int64_t row, std::int64_t group) const {
    return tile(row / band_rows, group) + row % band_rows * tile_line_bytes;
  }
};

// y = x / sqrt(mean(x^2) + eps), rounded to bfloat16; with `add`, sum = x + add first and then y of it.
// Strides are multiples of 64 and rows zero beyond their width. Moves 3 D floats a row.
struct NormaliseTiles {
  const float* x;
  const float* add;  // or null
  float* sum;        // written; null exactly when add is
  std::int64_t width, stride;
  TileRows y;  // written
  std::int64_t row_begin, row_end;
  float eps;
};

// x rounded to bfloat16. Moves 1.5 floats a column.
struct RoundTiles {
  const float* x;
  std::int64_t stride;
  TileRows y;  // written
  std::int64_t row_begin, row_end;
};

// Sums of a product, copied or added to rows.
struct UnloadTiles {
  const float* sums;  // [panels][bands][4][16][16]
  std::int64_t panels, rows;
  float* out;  // [rows][64 panels]
  std::int64_t out_stride;
  bool add;
};

// Panels of 32 gate and 32 up sums to one group of silu(gate) * up each.
struct SwigluTiles {
  const float* sums;  // [panels][bands][4][16][16]
  std::int64_t panels, rows;
  TileRows y;                           // written
  std::int64_t first_row, first_group;  // of y
};

HRMCORE_DECLARE_MATRIX_KERNEL(normalise_tiles, NormaliseTiles)
HRMCORE_DECLARE_MATRIX_KERNEL(round_tiles, RoundTiles)
HRMCORE_DECLARE_MATRIX_KERNEL(unload_tiles, UnloadTiles)
HRMCORE_DECLARE_MATRIX_KERNEL(swiglu_tiles, SwigluTiles)

}  // namespace hrmcore
