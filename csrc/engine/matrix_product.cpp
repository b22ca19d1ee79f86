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

// A chunk of a panel on its way to tiles: [4 x 16 rows][groups][16 pairs of columns][16 rows][2]. It goes in
// quarters of a tile, between the products of the chunk before it: the matrix unit leaves the vector units
// idle.
struct Widening {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t groups = 0, next = 0;
  __m512i order[4];

  std::int64_t quarters() const { return groups * panel_tiles * 4; }
};

// Lane 2 i + c takes byte c of row i: of byte pair 0 and rows 0-7, 8-15, then of byte pair 1.
void set_order(Widening& widening) {
  alignas(64) std::uint8_t bytes[4][64] = {};
  for (int lane = 0; lane < 16; ++lane) {
    for (int part = 0; part < 4; ++part) {
      bytes[part][4 * lane] =
          static_cast<std::uint8_t>(4 * (lane / 2 + 8 * (part % 2)) + 2 * (part / 2) + lane % 2);
    }
  }
  for (int part = 0; part < 4; ++part) widening.order[part] = _mm512_load_si512(bytes[part]);
}

template <Packing packing>
HRMCORE_INLINE void widen_quarter(Widening& w) {
  const std::int64_t group = w.next / 16, tile = w.next / 4 % 4, quarter = w.next % 4;
  ++w.next;
  const std::byte* from = w.from + group * group_bytes(packing);
  std::byte* to = w.to + (tile * w.groups + group) * tile_bytes + quarter * 4 * tile_line_bytes;
  const std::byte* cells = from + tile * tile_line_bytes;
  if constexpr (packing == Packing::bf16) {
    for (int line = 0; line < 4; ++line) {
      const vint pairs = load_bits(cells + (4 * quarter + line) * slab_bytes);
      __builtin_memcpy(to + line * tile_line_bytes, &pairs, sizeof(pairs));
    }
    return;
  }
  constexpr int slabs = packing == Packing::int8 ? 8 : 4;
  constexpr float offset = packing == Packing::int8 ? -128.0f : -8.0f;
  const vfloat rows = load(reinterpret_cast<const bf16*>(from + slabs * slab_bytes) + tile * lanes);
  const vfloat scale[2] = {
      __builtin_shufflevector(rows, rows, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
      __builtin_shufflevector(rows, rows, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)};
  const vfloat bias[2] = {scale[0] * offset, scale[1] * offset};
  if constexpr (packing == Packing::int8) {
    widen(load_bits(cells + 2 * quarter * slab_bytes), w.order, scale, bias, to);
    widen(load_bits(cells + (2 * quarter + 1) * slab_bytes), w.order, scale, bias, to + 2 * tile_line_bytes);
  } else {
    const vint both = load_bits(cells + quarter * slab_bytes);
    widen(both & 0x0f0f0f0f, w.order, scale, bias, to);
    widen((both >> 4) & 0x0f0f0f0f, w.order, scale, bias, to + 2 * tile_line_bytes);
  }
}

template <Packing packing>
HRMCORE_INLINE void widen_to(Widening& w, std::int64_t end) {
  while (w.next < end) widen_quarter<packing>(w);
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
template <Packing packing, int bands>
HRMCORE_INLINE void multiply_block(const Block& b, Widening& next, std::int64_t pace) {
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
    const std::int64_t end = next.next + pace;
    widen_to<packing>(next, end < next.quarters() ? end : next.quarters());
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

// The chunks of a call in their order: all panels of the first 16 groups, then of the next.
struct Walk {
  const MatrixProduct& args;
  std::int64_t panels;

  std::int64_t steps() const {
    return (args.weights.groups() + tile_chunk_groups - 1) / tile_chunk_groups * panels;
  }
  std::int64_t first_group(std::int64_t step) const { return step / panels * tile_chunk_groups; }
  std::int64_t groups(std::int64_t step) const { return args.x.chunk_groups(step / panels); }
  const std::byte* weights(std::int64_t step) const {
    return args.weights.data + (args.panel_begin + step % panels) * args.weights.panel_bytes() +
           first_group(step) * group_bytes(args.weights.packing);
  }
};

template <Packing packing>
void walk_chunks(const MatrixProduct& args) {
  const Walk walk{args, args.panel_end - args.panel_begin};
  const std::int64_t bands = args.band_end - args.band_begin, pairs = (bands + 1) / 2, steps = walk.steps();
  std::byte* rooms[2] = {args.scratch, args.scratch + matrix_scratch_bytes / 2};
  Widening widening;
  set_order(widening);
  const auto begin_widening = [&](std::int64_t step) {
    widening.from = walk.weights(step);
    widening.to = rooms[step % 2];
    widening.groups = walk.groups(step);
    widening.next = 0;
  };
  begin_widening(0);
  widen_to<packing>(widening, widening.quarters());
  for (std::int64_t step = 0; step < steps; ++step) {
    settle_memory();
    const std::int64_t panel = step % walk.panels, groups = walk.groups(step);
    if (step + 1 < steps) begin_widening(step + 1);
    const std::int64_t multiplications = 2 * pairs * groups;
    const std::int64_t pace = (widening.quarters() + multiplications - 1) / multiplications;
    const std::byte* ahead = step + 2 < steps ? walk.weights(step + 2) : nullptr;
    for (int half = 0; half < 2; ++half) {
      Block block{args.x.tile(args.band_begin, walk.first_group(step)),
                  rooms[step % 2] + 2 * half * groups * tile_bytes,
                  groups * tile_bytes,
                  groups * tile_bytes,
                  groups,
                  args.sums + (panel * bands * panel_tiles + 2 * half) * tile_floats,
                  panel_tiles * tile_floats,
                  step >= walk.panels};
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        if (ahead != nullptr)
          prefetch_part(ahead, walk.groups(step + 2) * group_bytes(packing), half * pairs + pair, 2 * pairs);
        if (2 * pair + 1 < bands) {
          multiply_block<packing, 2>(block, widening, pace);
        } else {
          multiply_block<packing, 1>(block, widening, pace);
        }
        block.x += 2 * block.x_step;
        block.sums += 2 * block.sums_step;
      }
    }
  }
}

}  // namespace

void matrix_product(const MatrixProduct& args) noexcept {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  switch (args.weights.packing) {
    case Packing::bf16:
      walk_chunks<Packing::bf16>(args);
      break;
    case Packing::int8:
      walk_chunks<Packing::int8>(args);
      break;
    case Packing::int4:
      walk_chunks<Packing::int4>(args);
      break;
    case Packing::f32:
      break;
  }
  _tile_release();
  settle_memory();
}

}  // namespace hrmcore::HRMCORE_ISA
