// Puts a weight matrix into its packed layout (weight_layout.h), quantising on the way.
//
//   int8: scale = max |w| / 127 of each 32 columns, rounded to bfloat16; w = round(w / scale).
//   int4: w in [-8, 7]; of twelve scales near max |w| / 8, each rounded to bfloat16, the one with the least
//         squared error.
//
// Reads 4 or 2 bytes a weight, writes what weight_layout.h states.
#pragma once

#include <atomic>

#include "core/isa.h"
#include "core/tensor.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

enum class RowOrder : std::uint8_t {
  plain,
  paired,  // rows gate (F) | up (F): each panel gets 32 gate rows, then the 32 up rows that belong to them
};

// Rows of the packed matrix that a source of `rows` rows becomes.
[[maybe_unused]] static std::int64_t packed_rows(std::int64_t rows, RowOrder order) {
  return order == RowOrder::plain ? rows : groups_of(rows / 2) * panel_rows;
}

struct PackRows {
  TensorView source;  // (R, K) float32 or bfloat16, unit stride in K
  RowOrder order;
  PackedMatrix target;
  std::byte* data;            // target.bytes(), written
  std::atomic<bool>& finite;  // made false where the source has a NaN or an infinity
};

struct UnpackRows {
  PackedMatrix source;
  RowOrder order;
  TensorView target;  // (R, K) float32, written
};

HRMCORE_DECLARE_KERNEL(pack_rows, PackRows)
HRMCORE_DECLARE_KERNEL(unpack_rows, UnpackRows)

}  // namespace hrmcore
