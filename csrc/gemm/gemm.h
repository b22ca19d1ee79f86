// Packed weights times activations: one code for a single row and for hundreds.
//
//   out[t][r] = sum over k of w[r][k] * x[t][k]
//
// Batch-invariant: the arithmetic of one out[t][r] does not depend on how many rows stand beside it.
//   f32, bf16:  over each chunk of 256 columns a chain of fused multiply-adds from zero, in order of k; the
//               chunks' sums are added in order. x is float32.
//   int8, int4: for each group of 32 columns the exact integer product, then one fused multiply-add of it
//               with (weight scale * activation scale), in order of the groups. x is QuantGroup.
//
// Moves the weights once, from memory while they stream; 2 R K FLOPs a row of activations.
#pragma once

#include "core/isa.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

// A range of whole panels of a matrix times some rows of activations.
struct PackedGemm {
  PackedMatrix weights;
  std::int64_t panel_begin, panel_end;
  const std::byte* x;        // [tokens][groups], each activation_bytes(packing)
  std::int64_t x_row_bytes;  // from one token to the next
  std::int64_t tokens;
  float* out;               // [tokens][64 (panel_end - panel_begin)], written
  std::int64_t out_stride;  // in floats
  std::byte* scratch;       // gemm_scratch_bytes, private to the thread, 64-byte aligned
  bool asks_ahead;          // for the next chunk's weights while one is multiplied
};

constexpr std::int64_t gemm_scratch_bytes = chunk_groups * 32 * slab_bytes;

HRMCORE_DECLARE_KERNEL(packed_gemm, PackedGemm)

}  // namespace hrmcore
