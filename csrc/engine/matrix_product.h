// Packed weights times rows of bfloat16 activations on the processor's matrix unit (AMX). The rows of a
// prefix take this way: they come by the hundred, and always all in one step, so a row's arithmetic follows
// from its position.
//
//   sums[t][r] = sum over k of bf16(w[r][k]) * x[t][k]
//
// w is what a packed weight stands for: bf16 as it is; an int8 or int4 times its scale, rounded to bfloat16.
// Each sum is one chain of float32 additions in order of k, whatever stands beside it: batch-invariant by
// construction.
//
// Moves the weights once per call; 2 R K FLOPs a row. Limit: 1,024 FLOPs a cycle.
#pragma once

#include "core/isa.h"
#include "engine/packed.h"
#include "engine/tiles.h"

namespace hrmcore {

struct MatrixProduct {
  PackedMatrix weights;  // bf16, int8 or int4; not f32, which it leaves alone
  std::int64_t panel_begin, panel_end;
  TileRows x;  // weights.groups() wide
  std::int64_t band_begin, band_end;
  float* sums;         // [panels][bands][4 tiles][16][16], written, 64-byte aligned
  std::byte* scratch;  // matrix_scratch_bytes, private to the thread, 64-byte aligned
};

// Two chunks of a panel in bfloat16: one is widened while the other is multiplied.
constexpr std::int64_t matrix_scratch_bytes = 2 * tile_chunk_groups * group_columns * panel_rows * 2;

HRMCORE_DECLARE_MATRIX_KERNEL(matrix_product, MatrixProduct)

}  // namespace hrmcore
