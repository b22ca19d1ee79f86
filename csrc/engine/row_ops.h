// What happens to a row of activations between two products. All rows are float32 with a stride that is a
// multiple of 64 and zeros beyond their width, so no kernel has a tail. T rows, D width, F ffn width.
#pragma once

#include "core/isa.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

// sum = x + add;  y = sum / sqrt(mean(sum^2) + eps), as the operand of a product. Moves 3 D floats a row.
struct NormaliseRows {
  const float* x;
  const float* add;  // or null
  float* sum;        // written; null exactly when add is
  std::byte* y;      // activation_bytes(packing) for each group of columns, written
  Packing packing;   // of the weights that y meets: a float packing keeps y in float32
  std::int64_t width, stride, y_row_bytes, row_begin, row_end;
  float eps;
};

// x as the operand of int8 or int4 weights: per row and group of 32. Moves 1.3 floats a column.
struct QuantiseRows {
  const float* x;
  std::byte* y;  // QuantGroup for each group, written
  std::int64_t groups, stride, row_begin, row_end;
};

// x += y over a range of columns, a multiple of 64.
struct AddRows {
  float* x;  // at the first column
  const float* y;
  std::int64_t rows, columns, x_stride, y_stride;
};

// Panels of 32 gate and 32 up values to 32 values silu(gate) * up each.
struct SwigluRows {
  const float* gate_up;  // [rows][64 panels]
  float* out;            // [rows][32 panels], written
  std::int64_t rows, panels, gate_up_stride, out_stride;
};

HRMCORE_DECLARE_KERNEL(normalise_rows, NormaliseRows)
HRMCORE_DECLARE_KERNEL(quantise_rows, QuantiseRows)
HRMCORE_DECLARE_KERNEL(add_rows, AddRows)
HRMCORE_DECLARE_KERNEL(swiglu_rows, SwigluRows)

}  // namespace hrmcore
