// The layout of packed weights, the same for every instruction set, so that a packed file serves any machine.
//
// A matrix (R rows out, K columns in) is cut into panels of 64 rows; a panel is a sequence of groups of 32
// columns, in the order in which a matrix-vector product reads them; a group is a sequence of 256-byte slabs,
// each of which holds one 4-byte cell for each of the 64 rows. Rows are the lanes of a vector, so a product
// needs no horizontal sum.
//
//   packing   a cell holds                                          slabs   scales          bytes a weight
//   f32       1 column                                              32      -               4
//   bf16      2 columns, the first in the low half                  16      -               2
//   int8      4 columns as unsigned bytes, w + 128                  8       64 bf16         1.0625
//   int4      8 columns: 4 in the low nibbles, 4 in the high, w + 8 4       64 bf16         0.5625
//
// Scales close their group. Rows beyond R and columns beyond K are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hrmcore {

enum class Packing : std::uint8_t { f32, bf16, int8, int4 };

constexpr std::int64_t panel_rows = 64;
constexpr std::int64_t group_columns = 32;
constexpr std::int64_t slab_bytes = 256;
constexpr std::int64_t scale_bytes = 128;
constexpr std::int64_t chunk_groups = 8;  // the reduction over K restarts every 256 columns (see gemm.h)

// What one group of one row of activations becomes when the weights are int8 or int4.
struct QuantGroup {
  std::int8_t q[group_columns];  // round(x / scale), in [-127, 127]
  float scale;                   // max |x| / 127
  std::int32_t sum;              // of q: undoes the weights' offset
};

[[maybe_unused]] static bool is_quantised(Packing packing) {
  return packing == Packing::int8 || packing == Packing::int4;
}

[[maybe_unused]] static std::int64_t groups_of(std::int64_t columns) {
  return (columns + group_columns - 1) / group_columns;
}

[[maybe_unused]] static std::int64_t panels_of(std::int64_t rows) {
  return (rows + panel_rows - 1) / panel_rows;
}

[[maybe_unused]] static std::int64_t group_bytes(Packing packing) {
  switch (packing) {
    case Packing::f32:
      return 32 * slab_bytes;
    case Packing::bf16:
      return 16 * slab_bytes;
    case Packing::int8:
      return 8 * slab_bytes + scale_bytes;
    case Packing::int4:
      return 4 * slab_bytes + scale_bytes;
  }
  return 0;
}

// Bytes that one group of one row of activations takes beside weights of this packing.
[[maybe_unused]] static std::int64_t activation_bytes(Packing packing) {
  return is_quantised(packing) ? std::int64_t{sizeof(QuantGroup)}
                               : std::int64_t{group_columns * sizeof(float)};
}

// A borrowed packed matrix.
struct PackedMatrix {
  Packing packing = Packing::f32;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const std::byte* data = nullptr;

  std::int64_t panels() const { return panels_of(rows); }
  std::int64_t groups() const { return groups_of(columns); }
  std::int64_t panel_bytes() const { return groups() * group_bytes(packing); }
  std::int64_t bytes() const { return panels() * panel_bytes(); }
};

}  // namespace hrmcore
