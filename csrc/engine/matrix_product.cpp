#include "engine/matrix_product.h"

#include "engine/lanes.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr int panel_tiles = panel_rows / lanes;
constexpr std::int64_t tile_floats = band_rows * lanes;

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile instructions are opaque to the compiler: what memory holds before them must be there.
HRMCORE_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

HRMCORE_INLINE void put_pair(vfloat low, vfloat high, std::byte* to) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  __builtin_memcpy(to, &both, sizeof(both));
}

// Bytes 2 h, 2 h + 1 of eight rows' cells each, as integers: the order in which a tile wants a pair of
// columns.
HRMCORE_INLINE vfloat pick(vint cells, __m512i order) {
  constexpr __mmask64 low_bytes = 0x1111111111111111ull;
  return to_float((vint)_mm512_maskz_permutexvar_epi8(low_bytes, order, (__m512i)cells));
}

// Sixteen rows, four columns: two lines of a tile. scale and bias belong to rows 0-7 and 8-15, each row
// twice.
HRMCORE_INLINE void widen(vint cells, const __m512i (&order)[4], const vfloat (&scale)[2],
                          const vfloat (&bias)[2], std::byte* to) {
#pragma GCC unroll 2
  for (int pair = 0; pair < 2; ++pair) {
    put_pair(fma(pick(cells, order[2 * pair]), scale[0], bias[0]),
             fma(pick(cells, order[2 * pair + 1]), scale[1], bias[1]), to + pair * tile_line_bytes);
  }
}

// One group of a panel to four tiles of [16 pairs of columns][16 rows][2], `tile_step` bytes apart.
void widen_group(Packing packing, const std::byte* from, const __m512i (&order)[4], std::byte* to,
                 std::int64_t tile_step) {
  const int slabs = packing == Packing::int8 ? 8 : 4;
  const auto* scales = reinterpret_cast<const bf16*>(from + slabs * slab_bytes);
  for (int tile = 0; tile < panel_tiles; ++tile, from += 64, to += tile_step) {
    const vfloat rows = load(scales + tile * lanes);
    const vfloat scale[2] = {
        __builtin_shufflevector(rows, rows, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
        __builtin_shufflevector(rows, rows, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)};
    const float offset = packing == Packing::int8 ? -128.0f : -8.0f;
    const vfloat bias[2] = {scale[0] * offset, scale[1] * offset};
    if (packing == Packing::int8) {
      for (int slab = 0; slab < 8; ++slab) {
        widen(load_bits(from + slab * slab_bytes), order, scale, bias, to + 2 * slab * tile_line_bytes);
      }
    } else {
      for (int slab = 0; slab < 4; ++slab) {
        const vint cells = load_bits(from + slab * slab_bytes);
        widen(cells & 0x0f0f0f0f, order, scale, bias, to + 4 * slab * tile_line_bytes);
        widen((cells >> 4) & 0x0f0f0f0f, order, scale, bias, to + (4 * slab + 2) * tile_line_bytes);
      }
    }
  }
}

void copy_group(const std::byte* from, std::byte* to, std::int64_t tile_step) {
  for (int slab = 0; slab < 16; ++slab) {
    for (int tile = 0; tile < panel_tiles; ++tile) {
      const vint cells = load_bits(from + slab * slab_bytes + tile * tile_line_bytes);
      __builtin_memcpy(to + tile * tile_step + slab * tile_line_bytes, &cells, sizeof(cells));
    }
  }
}

// A chunk of a panel as tiles: [4 x 16 rows][groups][tile].
void widen_chunk(Packing packing, const std::byte* from, std::int64_t groups, std::byte* to) {
  // Lane 2 i + c takes byte c of row i: of byte pair 0 and rows 0-7, 8-15, then of byte pair 1.
  alignas(64) std::uint8_t bytes[4][64] = {};
  for (int lane = 0; lane < 16; ++lane) {
    for (int part = 0; part < 4; ++part) {
      bytes[part][4 * lane] =
          static_cast<std::uint8_t>(4 * (lane / 2 + 8 * (part % 2)) + 2 * (part / 2) + lane % 2);
    }
  }
  __m512i order[4];
  for (int part = 0; part < 4; ++part) order[part] = _mm512_load_si512(bytes[part]);
  for (std::int64_t group = 0; group < groups; ++group, from += group_bytes(packing), to += tile_bytes) {
    if (packing == Packing::bf16) {
      copy_group(from, to, groups * tile_bytes);
    } else {
      widen_group(packing, from, order, to, groups * tile_bytes);
    }
  }
}

// Half a panel by one or two bands. Tiles of w follow w_step bytes later for the next 16 rows, those of x
// x_step bytes later for the next band, those of sums sums_step floats.
struct Block {
  const std::byte *x, *w;
  std::int64_t x_step, w_step, groups;
  float* sums;
  std::int64_t sums_step;
  bool accumulate;
};

// Sums in tiles 0-3, x in 4 and 5, w in 6 and 7.
template <int bands>
HRMCORE_INLINE void multiply_block(const Block& b) {
  float *here = b.sums, *below = b.sums + b.sums_step;
  if (b.accumulate) {
    _tile_loadd(0, here, tile_line_bytes);
    _tile_loadd(1, here + tile_floats, tile_line_bytes);
    if constexpr (bands == 2) {
      _tile_loadd(2, below, tile_line_bytes);
      _tile_loadd(3, below + tile_floats, tile_line_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const std::byte *x = b.x, *w = b.w;
  for (std::int64_t group = 0; group < b.groups; ++group, x += tile_bytes, w += tile_bytes) {
    _tile_loadd(6, w, tile_line_bytes);
    _tile_loadd(4, x, tile_line_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + b.w_step, tile_line_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (bands == 2) {
      _tile_loadd(5, x + b.x_step, tile_line_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, here, tile_line_bytes);
  _tile_stored(1, here + tile_floats, tile_line_bytes);
  if constexpr (bands == 2) {
    _tile_stored(2, below, tile_line_bytes);
    _tile_stored(3, below + tile_floats, tile_line_bytes);
  }
}

// Asks for the next chunk while this one is multiplied: `part` of `parts` pieces of it.
HRMCORE_INLINE void prefetch_part(const std::byte* from, std::int64_t bytes, std::int64_t part,
                                  std::int64_t parts) {
  const std::int64_t begin = bytes / 64 * part / parts, end = bytes / 64 * (part + 1) / parts;
  for (std::int64_t line = begin; line < end; ++line) __builtin_prefetch(from + 64 * line, 0, 2);
}

}  // namespace

void matrix_product(const MatrixProduct& args) noexcept {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  const PackedMatrix& w = args.weights;
  const std::int64_t group_size = group_bytes(w.packing), panels = args.panel_end - args.panel_begin;
  const std::int64_t bands = args.band_end - args.band_begin, pairs = (bands + 1) / 2;
  for (std::int64_t first = 0; first < w.groups(); first += tile_chunk_groups) {
    const std::int64_t groups = args.x.chunk_groups(first / tile_chunk_groups);
    const std::byte* weights = w.data + args.panel_begin * w.panel_bytes() + first * group_size;
    for (std::int64_t panel = 0; panel < panels; ++panel, weights += w.panel_bytes()) {
      widen_chunk(w.packing, weights, groups, args.scratch);
      settle_memory();
      const std::byte* next =
          weights + (panel + 1 < panels ? w.panel_bytes() : groups * group_size - panel * w.panel_bytes());
      for (int half = 0; half < 2; ++half) {
        Block block{args.x.tile(args.band_begin, first),
                    args.scratch + 2 * half * groups * tile_bytes,
                    groups * tile_bytes,
                    groups * tile_bytes,
                    groups,
                    args.sums + (panel * bands * panel_tiles + 2 * half) * tile_floats,
                    panel_tiles * tile_floats,
                    first > 0};
        for (std::int64_t pair = 0; pair < pairs; ++pair) {
          prefetch_part(next, groups * group_size, half * pairs + pair, 2 * pairs);
          if (2 * pair + 1 < bands) {
            multiply_block<2>(block);
          } else {
            multiply_block<1>(block);
          }
          block.x += 2 * block.x_step;
          block.sums += 2 * block.sums_step;
        }
      }
    }
  }
  _tile_release();
  settle_memory();
}

}  // namespace hrmcore::HRMCORE_ISA
