#include "gemm/pack.h"

#include "gemm/lanes.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

using Tile = float[group_columns][panel_rows];  // one group of one panel, rows as lanes

// The row of the source behind row `row` of panel `panel`, or -1 for padding.
HRMCORE_INLINE std::int64_t source_row(RowOrder order, std::int64_t rows, std::int64_t panel,
                                       std::int64_t row) {
  if (order == RowOrder::plain) {
    const std::int64_t index = panel * panel_rows + row;
    return index < rows ? index : -1;
  }
  const std::int64_t half = panel_rows / 2, index = panel * half + row % half;
  if (index >= rows / 2) return -1;
  return row < half ? index : rows / 2 + index;
}

// Fills the tile; adds to `taint` what is NaN when a weight is not finite, else 0.
template <class T>
void gather(const PackRows& args, std::int64_t panel, std::int64_t group, Tile& tile, vfloat& taint) {
  const std::int64_t columns = args.source.shape[1], first = group * group_columns;
  const std::int64_t count = columns - first < group_columns ? columns - first : group_columns;
  for (std::int64_t r = 0; r < panel_rows; ++r) {
    const std::int64_t row = source_row(args.order, args.source.shape[0], panel, r);
    const T* p = row < 0 ? nullptr : args.source.as<T>() + row * args.source.strides[0] + first;
    float line[group_columns] = {};
    if (p != nullptr && count == group_columns) {
      for (int k = 0; k < group_columns; k += lanes) {
        const vfloat w = load(p + k);
        taint += w * 0.0f;
        store(line + k, w);
      }
    } else if (p != nullptr) {
      for (std::int64_t k = 0; k < count; k += lanes) {
        const vfloat w = load_part(p + k, count - k < lanes ? count - k : lanes);
        taint += w * 0.0f;
        store_part(line + k, w, count - k < lanes ? count - k : lanes);
      }
    }
    for (int k = 0; k < group_columns; ++k) tile[k][r] = line[k];
  }
}

HRMCORE_INLINE vfloat absolute(vfloat v) { return (vfloat)((vint)v & 0x7fffffff); }

HRMCORE_INLINE vfloat round_to_bf16(vfloat v) {
  bf16 buffer[lanes];
  store(buffer, v);
  return load(buffer);
}

HRMCORE_INLINE vfloat round_to_integer(vfloat v) {
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23
  return (v + magic) - magic;
}

HRMCORE_INLINE vfloat reciprocal(vfloat scale) { return scale == 0.0f ? vfloat{} : 1.0f / scale; }

HRMCORE_INLINE vfloat quantise(vfloat w, vfloat inverse, float low, float high) {
  return min(max(round_to_integer(w * inverse), splat(low)), splat(high));
}

HRMCORE_INLINE vint to_int(vfloat v) { return __builtin_convertvector(v, vint); }

HRMCORE_INLINE vfloat int8_scale(const Tile& tile, int row) {
  vfloat top = {};
  for (int k = 0; k < group_columns; ++k) top = max(top, absolute(load(tile[k] + row)));
  return round_to_bf16(top / 127.0f);
}

HRMCORE_INLINE vfloat int4_scale(const Tile& tile, int row) {
  constexpr float divisors[] = {-8.5f,  -8.0f, -7.75f, -7.5f, -7.25f, -7.0f,
                                -6.75f, -6.5f, -6.0f,  7.25f, 6.75f,  6.25f};
  vfloat extreme = {};
  for (int k = 0; k < group_columns; ++k) {
    const vfloat w = load(tile[k] + row);
    extreme = absolute(w) > absolute(extreme) ? w : extreme;
  }
  vfloat best = {}, least = splat(3.0e38f);
  for (float divisor : divisors) {
    const vfloat scale = round_to_bf16(extreme / divisor);
    const vfloat inverse = reciprocal(scale);
    vfloat error = {};
    for (int k = 0; k < group_columns; ++k) {
      const vfloat w = load(tile[k] + row);
      const vfloat miss = w - scale * quantise(w, inverse, -8, 7);
      error += miss * miss;
    }
    best = error < least ? scale : best;
    least = min(error, least);
  }
  return best;
}

HRMCORE_INLINE void put(std::byte* p, vint cells) { __builtin_memcpy(p, &cells, sizeof(cells)); }

HRMCORE_INLINE vint byte_cell(const Tile& tile, int row, int column, vfloat inverse, float limit,
                              int offset) {
  vint cell = {};
  for (int byte = 0; byte < 4; ++byte) {
    const vfloat q = quantise(load(tile[column + byte] + row), inverse, -limit, limit == 8 ? 7 : limit);
    cell |= (to_int(q) + offset) << (8 * byte);
  }
  return cell;
}

void write_group(const Tile& tile, Packing packing, std::byte* to) {
  for (int row = 0; row < panel_rows; row += lanes) {
    std::byte* slab = to + 4 * row;
    switch (packing) {
      case Packing::f32:
        for (int k = 0; k < group_columns; ++k) put(slab + k * slab_bytes, (vint)load(tile[k] + row));
        break;
      case Packing::bf16:
        for (int k = 0; k < group_columns; k += 2) {
          const vint low = (vint)round_to_bf16(load(tile[k] + row)),
                     high = (vint)round_to_bf16(load(tile[k + 1] + row));
          put(slab + k / 2 * slab_bytes, (vint)((vuint)low >> 16) | high);
        }
        break;
      case Packing::int8: {
        const vfloat scale = int8_scale(tile, row), inverse = reciprocal(scale);
        for (int k = 0; k < group_columns; k += 4) {
          put(slab + k / 4 * slab_bytes, byte_cell(tile, row, k, inverse, 127, 128));
        }
        store(reinterpret_cast<bf16*>(to + 8 * slab_bytes) + row, scale);
        break;
      }
      case Packing::int4: {
        const vfloat scale = int4_scale(tile, row), inverse = reciprocal(scale);
        for (int k = 0; k < group_columns; k += 8) {
          const vint low = byte_cell(tile, row, k, inverse, 8, 8),
                     high = byte_cell(tile, row, k + 4, inverse, 8, 8);
          put(slab + k / 8 * slab_bytes, low | (high << 4));
        }
        store(reinterpret_cast<bf16*>(to + 4 * slab_bytes) + row, scale);
        break;
      }
    }
  }
}

void read_group(const std::byte* from, Packing packing, Tile& tile) {
  for (int row = 0; row < panel_rows; row += lanes) {
    const std::byte* slab = from + 4 * row;
    const int slabs = packing == Packing::f32    ? 32
                      : packing == Packing::bf16 ? 16
                      : packing == Packing::int8 ? 8
                                                 : 4;
    const int columns = group_columns / slabs;
    vfloat scale = {};
    if (is_quantised(packing)) scale = load(reinterpret_cast<const bf16*>(from + slabs * slab_bytes) + row);
    for (int k = 0; k < group_columns; ++k) {
      const vint cell = load_bits(slab + k / columns * slab_bytes);
      const int part = k % columns;
      vfloat w = (vfloat)cell;
      if (packing == Packing::bf16) w = part == 0 ? low_half(cell) : high_half(cell);
      if (packing == Packing::int8) w = to_float(((cell >> (8 * part)) & 255) - 128) * scale;
      if (packing == Packing::int4)
        w = to_float(((cell >> (8 * (part % 4) + 4 * (part / 4))) & 15) - 8) * scale;
      store(tile[k] + row, w);
    }
  }
}

}  // namespace

void pack_rows(const PackRows& args) noexcept {
  const PackedMatrix& target = args.target;
  parallel_for(target.panels(), 1, [&](std::int64_t begin, std::int64_t end) {
    Tile tile;
    vfloat taint = {};
    for (std::int64_t panel = begin; panel < end; ++panel) {
      for (std::int64_t group = 0; group < target.groups(); ++group) {
        if (args.source.dtype == DType::bf16) {
          gather<bf16>(args, panel, group, tile, taint);
        } else {
          gather<float>(args, panel, group, tile, taint);
        }
        write_group(tile, target.packing,
                    args.data + panel * target.panel_bytes() + group * group_bytes(target.packing));
      }
    }
    for (int lane = 0; lane < lanes; ++lane) {
      if (taint[lane] != 0) args.finite.store(false, std::memory_order_relaxed);
    }
  });
}

void unpack_rows(const UnpackRows& args) noexcept {
  const PackedMatrix& source = args.source;
  parallel_for(source.panels(), 1, [&](std::int64_t begin, std::int64_t end) {
    Tile tile;
    for (std::int64_t panel = begin; panel < end; ++panel) {
      for (std::int64_t group = 0; group < source.groups(); ++group) {
        read_group(source.data + panel * source.panel_bytes() + group * group_bytes(source.packing),
                   source.packing, tile);
        for (std::int64_t r = 0; r < panel_rows; ++r) {
          const std::int64_t row = source_row(args.order, args.target.shape[0], panel, r);
          for (std::int64_t k = 0; row >= 0 && k < group_columns; ++k) {
            const std::int64_t column = group * group_columns + k;
            if (column < args.target.shape[1]) {
              args.target.as<float>()[row * args.target.strides[0] + column] = tile[k][r];
            }
          }
        }
      }
    }
  });
}

}  // namespace hrmcore::HRMCORE_ISA
