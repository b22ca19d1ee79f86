// Packed weights times rows of activations in tiles: on AMX, the processor's matrix unit, or on vectors of 256 bits or
// more. The rows of a prefix take this way: they come by the hundred, and always all in one step, so a row's arithmetic
// follows from its position and the prefix's length.
//
//   sums[t][r] = sum over k of w[r][k] * x[t][k]
//
//   tile_gemm_bf16  bf16 weights, bfloat16 activations; each sum is one chain of float32 additions in order
//                   of k. AVX-512 BF16 or AMX
//   tile_gemm_int8  int8 and int4 weights, int8 activations with a scale for each row and chunk of 256
//                   columns. A group of 32 weights keeps no scale of its own, which would cost a conversion and two
//                   multiplications for eight products; it is brought to the largest of its row's in the chunk, rounded
//                   anew to int8 (rescale.h). The integer product of a chunk is exact, then one fused
//                   multiply-add of it with both scales, in order of the chunks: the same sums in every set.
//
// Both are batch-invariant by construction.
//
// Moves the weights once per call; 2 R K FLOPs a row. Limit: 1,024 FLOPs a cycle on AMX, in int8 twice that;
// 64 on AVX-512 BF16 where it multiplies 32 pairs a cycle (Zen 4), twice what float32 gets there. int8 on VNNI: 128
// where a vector of 512 bits is multiplied each cycle (Zen 4), of which the weights' rescaling takes 8 of 256 rows' time
// and the sums' scales 3%. Without VNNI two products take two instructions, so 64 where four vectors of 256 bits are
// begun each cycle.
#pragma once

#include <limits>

#include "core/isa.h"
#include "gemm/row_tiles.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

struct TileGemm {
  PackedMatrix weights;
  std::int64_t panel_begin, panel_end;
  TileRows x;
  std::int64_t band_begin, rows;  // of x; at most tile_gemm_rows
  float* sums;                    // [panels][bands][4 tiles][16][16], the rows written; 64-byte aligned
  std::byte* scratch;             // tile_scratch_bytes, private to the thread, 64-byte aligned

  std::int64_t bands() const { return bands_of(rows); }
};

constexpr std::int64_t tile_gemm_rows = 256;  // at most

// The most is a panel's chunk and 256 rows of a chunk of x in 16 bits, and what goes with them.
constexpr std::int64_t tile_scratch_bytes =
    (tile_gemm_rows + panel_rows) * tile_chunk_columns * 2 + 8 * tile_chunk_columns * 4;

constexpr std::int64_t no_tiles = std::numeric_limits<std::int64_t>::max();

// The fewest tokens of a prefix that meets such weights in tiles. Rescaling them takes as long as multiplying some ten
// rows, on AMX none, which does it meanwhile. int4 without VNNI takes no tiles: there its nibbles are multiplied as they
// are, 32 at once, and rescaled to int8 only 16.
[[maybe_unused]] static std::int64_t shortest_tiled_prefix(Isa isa, Packing packing) {
  const bool vnni = isa == Isa::avxvnni || isa == Isa::vnni || isa == Isa::bf16;
  const bool products = isa == Isa::avx2 || isa == Isa::avx512 || vnni;
  if (packing == Packing::f32) return no_tiles;
  if (isa == Isa::amx || (isa == Isa::bf16 && packing == Packing::bf16)) return 1;
  return (packing == Packing::int8 && products) || (packing == Packing::int4 && vnni) ? 24 : no_tiles;
}

HRMCORE_DECLARE_BF16_KERNEL(tile_gemm_bf16, TileGemm)
HRMCORE_DECLARE_TILE_KERNEL(tile_gemm_int8, TileGemm)

}  // namespace hrmcore
