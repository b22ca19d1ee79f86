// Products of tiles in bfloat16, on the matrix unit of `amx` or by the pairs of `bf16`; and packed weights widened to
// tiles.
#pragma once

#include "gemm/lanes.h"
#include "gemm/row_tiles.h"
#include "gemm/weight_layout.h"

namespace hrmcore::HRMCORE_ISA {

// The tile instructions are opaque to the compiler: what memory holds before them must be there.
HRMCORE_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// Rows of two columns: the first lane of each, then the second of each, and so on.
HRMCORE_INLINE void put_interleaved(vfloat even, vfloat odd, std::byte* to) {
  const auto bits = [](vfloat x) __attribute__((always_inline)) {
    return __builtin_convertvector((vhalf)_mm512_cvtneps_pbh((__m512)x), vuint);
  };
  const vuint pairs = bits(even) | bits(odd) << 16;
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}

// Bytes 2 h, 2 h + 1 of eight rows' cells each, as integers: the order in which a tile wants a pair of
// columns. Each lane's cell comes first where there is no instruction that moves bytes anywhere.
HRMCORE_INLINE vfloat pick(vint cells, __m512i order) {
#if defined(__AVX512VBMI__)
  constexpr __mmask64 low_bytes = 0x1111111111111111ull;
  return to_float((vint)_mm512_maskz_permutexvar_epi8(low_bytes, order, (__m512i)cells));
#else
  const vint byte = (vint)order & 63;
  const vint own = (vint)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)(byte >> 2), (__m512i)cells);
  return to_float(own >> (byte % 4 * 8) & 255);
#endif
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
// quarters of a tile, on AMX between the products of the chunk before it: they leave the vector units idle.
struct Widening {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t groups = 0, next = 0;
  __m512i order[4];

  std::int64_t quarters() const { return groups * panel_tiles * 4; }
};

// Lane 2 i + c takes byte c of row i: of byte pair 0 and rows 0-7, 8-15, then of byte pair 1.
HRMCORE_INLINE void set_order(Widening& widening) {
  alignas(64) std::uint8_t bytes[4][64] = {};
  for (int lane = 0; lane < 16; ++lane) {
    for (int part = 0; part < 4; ++part) {
      bytes[part][4 * lane] =
          static_cast<std::uint8_t>(4 * (lane / 2 + 8 * (part % 2)) + 2 * (part / 2) + lane % 2);
    }
  }
  for (int part = 0; part < 4; ++part) widening.order[part] = _mm512_load_si512(bytes[part]);
}

template <Packing packing>  // bf16 or int8
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
  const vfloat rows = load(reinterpret_cast<const bf16*>(from + 8 * slab_bytes) + tile * lanes);
  const vfloat scale[2] = {
      __builtin_shufflevector(rows, rows, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
      __builtin_shufflevector(rows, rows, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15)};
  const vfloat bias[2] = {scale[0] * -128.0f, scale[1] * -128.0f};
  for (int pair = 0; pair < 2; ++pair) {
    widen(load_bits(cells + (2 * quarter + pair) * slab_bytes), w.order, scale, bias,
          to + 2 * pair * tile_line_bytes);
  }
}

template <Packing packing>
HRMCORE_INLINE void widen_to(Widening& w, std::int64_t end) {
  while (w.next < end) widen_quarter<packing>(w);
}

// One or two bands of x by two tiles' breadth of w. Tiles of w follow w_step bytes later for the second,
// those of x x_step bytes later for the next band, those of sums sums_step floats.
struct Block {
  const std::byte *x, *w;
  std::int64_t x_step, w_step, groups;
  float* sums;
  std::int64_t sums_step;
  bool accumulate;
};

// acc + both products of each lane's pair, in float32.
HRMCORE_INLINE vfloat dot2(vfloat acc, vint w, vint x) {
  return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
}

#if defined(HRMCORE_ISA_amx)

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Of this thread, for as long as it lives.
struct TileUnit {
  HRMCORE_METHOD TileUnit() {
    const TileShapes shapes;
    settle_memory();
    _tile_loadconfig(&shapes);
  }
  HRMCORE_METHOD ~TileUnit() { _tile_release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// Sums in tiles 0-3, x in 4 and 5, w in 6 and 7. meanwhile(): a little work for the vector units.
template <int bands, class Meanwhile>
HRMCORE_INLINE void multiply_block(const Block& b, const Meanwhile& meanwhile) {
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
    meanwhile();
  }
  _tile_stored(0, here, tile_line_bytes);
  _tile_stored(1, here + tile_floats, tile_line_bytes);
  if constexpr (bands == 2) {
    _tile_stored(2, below, tile_line_bytes);
    _tile_stored(3, below + tile_floats, tile_line_bytes);
  }
}

#else

struct [[maybe_unused]] TileUnit {};

// Eight rows of x by two vectors of w, which follow w_step bytes later for the second and pair_step for the next pair of
// columns: 16 sums, more than the multiplication's latency needs; 16 products, 2 loads and 8 broadcasts for a pair.
template <class Meanwhile>
HRMCORE_INLINE void multiply_eight(const std::byte* x, const std::byte* w, std::int64_t w_step,
                                   std::int64_t pair_step, std::int64_t groups, float* sums, bool accumulate,
                                   const Meanwhile& meanwhile) {
  constexpr int rows = 8, vectors = 2;
  vfloat acc[rows][vectors] = {};
  if (accumulate) {
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[row][v] = load(sums + v * tile_floats + row * lanes);
    }
  }
  for (std::int64_t group = 0; group < groups; ++group, x += tile_bytes) {
    meanwhile();
#pragma GCC unroll 2
    for (int pair = 0; pair < group_columns / 2; ++pair, w += pair_step) {
      const vint weight[vectors] = {load_bits(w), load_bits(w + w_step)};
#pragma GCC unroll 8
      for (int row = 0; row < rows; ++row) {
        const vint both = splat_bits(load_cell(x + row * tile_line_bytes + 4 * pair));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) acc[row][v] = dot2(acc[row][v], weight[v], both);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(sums + v * tile_floats + row * lanes, acc[row][v]);
  }
}

template <int bands, class Meanwhile>
HRMCORE_INLINE void multiply_block(const Block& b, const Meanwhile& meanwhile) {
  for (int half = 0; half < 2 * bands; ++half) {
    const std::int64_t band = half / 2, row = half % 2 * 8;
    multiply_eight(b.x + band * b.x_step + row * tile_line_bytes, b.w, b.w_step, tile_line_bytes, b.groups,
                   b.sums + band * b.sums_step + row * lanes, b.accumulate, meanwhile);
  }
}

#endif

}  // namespace hrmcore::HRMCORE_ISA
