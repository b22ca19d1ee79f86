#include "gemm/chunk_walk.h"
#include "gemm/dots.h"
#include "gemm/rescale.h"
#include "gemm/tile_gemm.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

// With VNNI four products of bytes are one instruction, unsigned by signed: x + 128 by w. Without it the products of
// bytes saturate, so both are 16 bits wide and two products are two instructions; a cell's four columns then lie in two
// lanes, and those of `lanes` rows in two vectors.
#if defined(HRMCORE_VNNI)
constexpr int parts = 1;
#else
constexpr int parts = 2;
#endif
// A block is so many rows of x, all in one band, by `vectors` times `lanes` rows of a panel: 16 sums in 512 bits, which
// is more than the multiplication's latency needs, and 8 in 256.
constexpr int tokens = 4, vectors = (lanes == 16 ? 4 : 2) / parts;
constexpr int block_rows = vectors * lanes, vector_bytes = lanes * 4;
constexpr int cell_bytes = 4 * parts;  // of one row's four columns
constexpr std::int64_t slice_bytes = block_rows * cell_bytes, block_slices = tile_chunk_columns / 4;
constexpr std::int64_t x_group_bytes = group_columns * parts;

#if defined(HRMCORE_VNNI)
HRMCORE_INLINE vint spread_cell(const std::byte* x) { return splat_bits(load_cell(x)); }
HRMCORE_INLINE vint multiply_cells(vint acc, vint x, vint w) { return dot4(acc, x, w); }
HRMCORE_INLINE vint join_parts(const vint (&sums)[1]) { return sums[0]; }
#else
// A sum as it is: GCC would make many products first and add them as a tree, and has no registers for them.
HRMCORE_INLINE vint in_order(vint sum) {
#if defined(HRMCORE_AVX512)
  asm("" : "+v"(sum));
#else
  asm("" : "+x"(sum));
#endif
  return sum;
}
#endif
#if defined(HRMCORE_VNNI)
#elif defined(HRMCORE_AVX512)
HRMCORE_INLINE vint spread_cell(const std::byte* x) {
  long long cell;
  __builtin_memcpy(&cell, x, sizeof(cell));
  return (vint)_mm512_set1_epi64(cell);
}
HRMCORE_INLINE vint multiply_cells(vint acc, vint x, vint w) {
  return in_order(acc + (vint)_mm512_madd_epi16((__m512i)x, (__m512i)w));
}
HRMCORE_INLINE vint join_parts(const vint (&sums)[2]) {
  const __m512 low = (__m512)sums[0], high = (__m512)sums[1];
  return (vint)_mm512_shuffle_ps(low, high, 0x88) + (vint)_mm512_shuffle_ps(low, high, 0xdd);
}
#else
HRMCORE_INLINE vint spread_cell(const std::byte* x) {
  long long cell;
  __builtin_memcpy(&cell, x, sizeof(cell));
  return (vint)_mm256_set1_epi64x(cell);
}
HRMCORE_INLINE vint multiply_cells(vint acc, vint x, vint w) {
  return in_order(acc + (vint)_mm256_madd_epi16((__m256i)x, (__m256i)w));
}
HRMCORE_INLINE vint join_parts(const vint (&sums)[2]) {
  return (vint)_mm256_hadd_epi32((__m256i)sums[0], (__m256i)sums[1]);
}
#endif

struct alignas(64) Scratch {
  // A panel's chunk: what a block reads lies together, by slices of four columns.
  std::byte weights[panel_rows / block_rows][block_slices][slice_bytes];
  std::int32_t starts[panel_rows];  // of sums: -128 times the sum of a row's weights, where x is x + 128
  float scales[panel_rows];
  RowShares shares;
  std::int16_t x[parts == 1 ? 1 : tile_gemm_rows][tile_chunk_columns];  // all rows of a chunk, in 16 bits
};
static_assert(sizeof(Scratch) <= tile_scratch_bytes, "the scratch must hold it");

template <Packing packing>
void fill(Scratch& room, const std::byte* chunk, std::int64_t groups) {
  find_shares<packing>(chunk, groups, room.shares, room.scales);
  vint sums[panel_rows / lanes] = {};
  for (std::int64_t group = 0; group < groups; ++group, chunk += group_bytes(packing)) {
#pragma GCC unroll 4
    for (int row = 0; row < panel_rows; row += lanes) {
      const Halves shares = load_shares(room.shares, group, row);
      std::byte* out = room.weights[row / block_rows][group * most_cells] + row % block_rows * cell_bytes;
      const auto put = [&](int, const Halves& weights) __attribute__((always_inline)) {
        if constexpr (parts == 1) {
          const vint bytes = pack(weights);
          sums[row / lanes] = multiply_cells(sums[row / lanes], splat_bits(0x01010101), bytes);
          __builtin_memcpy(out, &bytes, sizeof(bytes));
        } else {
          __builtin_memcpy(out, &weights, sizeof(weights));
        }
        out += slice_bytes;
      };
      for (int slab = 0; slab < slabs_of(packing); ++slab)
        rescale<packing>(chunk + slab * slab_bytes + 4 * row, shares, put);
    }
  }
  for (int row = 0; row < panel_rows; row += lanes) {
    sums[row / lanes] *= -128;
    __builtin_memcpy(room.starts + row, &sums[row / lanes], sizeof(vint));
  }
}

// The rows of x in a chunk, where they have to be wider than their tiles.
void widen_rows(const TileGemm& args, std::int64_t chunk, std::int64_t groups, Scratch& room) {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const std::byte* tile = args.x.line(args.band_begin * band_rows + row, chunk);
    for (std::int64_t group = 0; group < groups; ++group) {
      const auto* from =
          reinterpret_cast<const std::int8_t*>(tile + group / 2 * tile_bytes + group % 2 * group_columns);
      std::int16_t* to = room.x[row] + group * group_columns;
      for (int c = 0; c < group_columns; ++c) to[c] = from[c];
    }
  }
}

// What a block reads and writes beside its weights.
struct Step {
  const TileGemm& args;
  const Scratch& room;
  std::int64_t chunk, groups;
  float* sums;  // of the panel
  PrefetchRange ahead;
  std::int64_t lines;  // of it, for a group of a block

  // The first cell of a row, and from one to the next in its band.
  const std::byte* x(std::int64_t row) const {
    if constexpr (parts == 2) return reinterpret_cast<const std::byte*>(room.x[row]);
    return args.x.line(args.band_begin * band_rows + row, chunk);
  }
  static constexpr std::int64_t x_step = parts == 2 ? tile_chunk_columns * 2 : tile_line_bytes;
};

template <int count>
void multiply_block(Step& s, std::int64_t first, std::int64_t row) {
  vint acc[count][vectors][parts];
#pragma GCC unroll 8
  for (int t = 0; t < count; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part)
        acc[t][v][part] = parts == 1 ? load_bits(s.room.starts + first + v * lanes) : vint{};
    }
  }
  const std::byte *x = s.x(row), *w = s.room.weights[first / block_rows][0];
  for (std::int64_t group = 0; group < s.groups; ++group) {
    prefetch_lines(s.ahead, s.lines);
#pragma GCC unroll 8
    for (int cell = 0; cell < most_cells; ++cell, w += slice_bytes) {
      vint weight[vectors][parts];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 2
        for (int part = 0; part < parts; ++part)
          weight[v][part] = load_bits(w + (v * parts + part) * vector_bytes);
      }
#pragma GCC unroll 8
      for (int t = 0; t < count; ++t) {
        const vint value = spread_cell(x + t * s.x_step + cell * cell_bytes);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 2
          for (int part = 0; part < parts; ++part)
            acc[t][v][part] = multiply_cells(acc[t][v][part], value, weight[v][part]);
        }
      }
    }
    x += parts == 1 && group % 2 == 1 ? tile_bytes - x_group_bytes : x_group_bytes;
  }
  const std::int64_t band = row / band_rows, line = row % band_rows;
  const float* scales = s.args.x.scales(s.args.band_begin + band, s.chunk) + line;
  float* sums = s.sums + (band * panel_tiles * band_rows + line) * band_rows +
                first / band_rows * tile_floats + first % band_rows;
#pragma GCC unroll 8
  for (int t = 0; t < count; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      float* to = sums + t * band_rows + v * lanes / band_rows * tile_floats + v * lanes % band_rows;
      const vfloat value = to_float(join_parts(acc[t][v])) * splat(scales[t]);
      const vfloat columns = load(s.room.scales + first + v * lanes);
      store(to, s.chunk > 0 ? fma(value, columns, load(to)) : value * columns);
    }
  }
}

template <int limit>
HRMCORE_INLINE void multiply_rows(std::int64_t count, Step& step, std::int64_t first, std::int64_t row) {
  if (count >= limit) return multiply_block<limit>(step, first, row);
  if constexpr (limit > 1) multiply_rows<limit - 1>(count, step, first, row);
}

template <Packing packing>
void walk_chunks(const TileGemm& args) {
  const ChunkWalk walk{args};
  auto& room = *reinterpret_cast<Scratch*>(args.scratch);
  for (std::int64_t at = 0; at < walk.steps; ++at) {
    const std::int64_t chunk = walk.chunk(at), groups = walk.groups(at);
    if (parts == 2 && walk.panel(at) == 0) widen_rows(args, chunk, groups, room);
    fill<packing>(room, walk.weights(at), groups);
    const PrefetchRange ahead = walk.prefetch(at + 1);
    const std::int64_t turns = panel_rows / block_rows * ((args.rows + tokens - 1) / tokens) * groups;
    float* sums = args.sums + walk.panel(at) * args.bands() * panel_tiles * tile_floats;
    Step step{args, room, chunk, groups, sums, ahead, ((ahead.end - ahead.next) / 64 + turns - 1) / turns};
    for (std::int64_t first = 0; first < panel_rows; first += block_rows) {
      for (std::int64_t row = 0; row < args.rows; row += tokens)
        multiply_rows<tokens>(args.rows - row, step, first, row);
    }
  }
}

}  // namespace

void tile_gemm_int8(const TileGemm& args) noexcept {
  args.weights.packing == Packing::int8 ? walk_chunks<Packing::int8>(args) : walk_chunks<Packing::int4>(args);
}

}  // namespace hrmcore::HRMCORE_ISA
