#include "gemm/amx_unit.h"
#include "gemm/chunk_walk.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr std::int64_t chunk_tiles = tile_chunk_columns / 64;

// A panel's chunk as int8 with one scale for each row:
// [4 x 16 rows][tiles][16 x 4 columns][16 rows][4 columns].
struct alignas(64) Room {
  std::byte tiles[panel_tiles * chunk_tiles * tile_bytes];
  float scales[panel_rows];
};

// What the unit has summed of a block, as integers, on its way to the sums.
struct alignas(64) Integers {
  std::int32_t sums[4][tile_floats];
};

struct Scratch {
  Room rooms[2];
  Integers integers[2];
  std::int16_t shares[tile_chunk_groups][panel_rows][4];  // of a group's scale in the row's, times 2^15
};
static_assert(sizeof(Scratch) <= tile_scratch_bytes, "the scratch must hold it");

// A panel's chunk on its way to one scale for each row, the largest magnitude of its groups' (an int4 has
// negative scales, too), where the largest weight is 127. It goes in quarters of a tile, between the products
// of the chunk before it.
struct Rescaling {
  const std::byte* from;
  Room* to;
  std::int64_t groups, next;

  std::int64_t quarters() const { return groups * panel_tiles * 2; }
};

constexpr std::int64_t slabs_of(Packing packing) { return packing == Packing::int8 ? 8 : 4; }

// Rows' shares, each four times: for the two halves that unpack makes of sixteen rows.
HRMCORE_INLINE void put_shares(vint shares, std::int16_t* out) {
  const vint whole = (shares > 32767 ? splat_bits(32767) : shares) & 0xffff;
  const vint twice = whole | whole << 16;
  const vint low = __builtin_shufflevector(twice, twice, 0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
  const vint high =
      __builtin_shufflevector(twice, twice, 2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  __builtin_memcpy(out, &low, sizeof(low));
  __builtin_memcpy(out + 32, &high, sizeof(high));
}

template <Packing packing>
HRMCORE_INLINE Rescaling begin_rescaling(const std::byte* from, std::int64_t groups, Room* to,
                                         Scratch& scratch) {
  // An int4 enters as 16 times itself, at most 128.
  constexpr float worth = packing == Packing::int8 ? 1.0f : 8.0f / 127,
                  whole = packing == Packing::int8 ? 32768.0f : 32512.0f;
  for (int tile = 0; tile < panel_tiles; ++tile) {
    vfloat scales[tile_chunk_groups], top = splat(1e-30f);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::byte* group = from + g * group_bytes(packing) + slabs_of(packing) * slab_bytes;
      scales[g] = load(reinterpret_cast<const bf16*>(group) + tile * lanes);
      top = max(top, (vfloat)((vint)scales[g] & 0x7fffffff));
    }
    store(to->scales + tile * lanes, top * worth);
    const vfloat inverse = whole / top;
    for (std::int64_t g = 0; g < groups; ++g)
      put_shares(round_product(scales[g], inverse), scratch.shares[g][tile * lanes]);
  }
  return {from, to, groups, 0};
}

// Sixteen rows, four columns: a line. unpack and pack work within 16 bytes, so they undo each other.
HRMCORE_INLINE void rescale(__m512i bytes, const __m512i (&shares)[2], std::byte* out) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i low = _mm512_srai_epi16(_mm512_unpacklo_epi8(zero, bytes), 8);
  const __m512i high = _mm512_srai_epi16(_mm512_unpackhi_epi8(zero, bytes), 8);
  _mm512_store_si512(
      out, _mm512_packs_epi16(_mm512_mulhrs_epi16(low, shares[0]), _mm512_mulhrs_epi16(high, shares[1])));
}

template <Packing packing>
HRMCORE_INLINE void rescale_quarter(Rescaling& r, const Scratch& scratch) {
  constexpr std::int64_t slabs = slabs_of(packing) / 2;
  const std::int64_t group = r.next / (panel_tiles * 2), tile = r.next / 2 % panel_tiles, half = r.next % 2;
  ++r.next;
  const std::int16_t* row_shares = scratch.shares[group][tile * lanes];
  const __m512i shares[2] = {_mm512_load_si512(row_shares), _mm512_load_si512(row_shares + 32)};
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const std::byte* cells =
      r.from + group * group_bytes(packing) + half * slabs * slab_bytes + tile * tile_line_bytes;
  std::byte* out = r.to->tiles + (tile * chunk_tiles + group / 2) * tile_bytes +
                   (group % 2 * 8 + half * 4) * tile_line_bytes;
#pragma GCC unroll 4
  for (std::int64_t slab = 0; slab < slabs; ++slab, cells += slab_bytes, out += tile_line_bytes) {
    const __m512i bytes = _mm512_loadu_si512(cells);
    if constexpr (packing == Packing::int8) {
      rescale(_mm512_xor_si512(bytes, sign), shares, out);
    } else {
      const __m512i high_nibbles = _mm512_set1_epi8(static_cast<char>(0xf0));
      const __m512i low = _mm512_and_si512(_mm512_slli_epi16(bytes, 4), high_nibbles);
      const __m512i high = _mm512_and_si512(bytes, high_nibbles);
      rescale(_mm512_xor_si512(low, sign), shares, out);
      out += tile_line_bytes;
      rescale(_mm512_xor_si512(high, sign), shares, out);
    }
  }
}

template <Packing packing>
HRMCORE_INLINE void go_on(Rescaling& r, std::int64_t quarters, const Scratch& scratch) {
  const std::int64_t end = r.next + quarters < r.quarters() ? r.next + quarters : r.quarters();
  while (r.next < end) rescale_quarter<packing>(r, scratch);
}

// A block's integers, times both scales, to its sums, a tile of 16 by 16 at a time: while the unit multiplies
// the next block.
struct Unloading {
  const Integers* from = nullptr;
  float* to = nullptr;  // of its first band; the next follows `step` floats later
  std::int64_t step = 0;
  const float *row_scales = nullptr, *column_scales = nullptr;  // of x: [bands][16]; of w: [2][16]
  bool add = false;
  int tiles = 0, next = 0;
};

HRMCORE_INLINE void unload_tile(Unloading& u) {
  const std::int32_t* integers = u.from->sums[u.next];
  float* sums = u.to + u.next / 2 * u.step + u.next % 2 * tile_floats;
  const float* scales = u.row_scales + u.next / 2 * band_rows;
  const vfloat columns = load(u.column_scales + u.next % 2 * lanes);
  ++u.next;
#pragma GCC unroll 4
  for (int row = 0; row < band_rows; ++row, integers += lanes, sums += lanes) {
    const vfloat value = to_float(load_bits(integers)) * splat(scales[row]);
    store(sums, u.add ? fma(value, columns, load(sums)) : value * columns);
  }
}

HRMCORE_INLINE void go_on(Unloading& u, int tiles) {
  for (; tiles > 0 && u.next < u.tiles; --tiles) unload_tile(u);
}

// One or two bands of x by two tiles' breadth of w, as in amx_unit.h.
template <int bands, class Meanwhile>
HRMCORE_INLINE void multiply(const std::byte* x, std::int64_t tiles, const std::byte* w, Integers& out,
                             const Meanwhile& meanwhile) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const std::byte* below = x + tiles * tile_bytes;
  const std::byte* beside = w + chunk_tiles * tile_bytes;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t at = tile * tile_bytes;
    _tile_loadd(6, w + at, tile_line_bytes);
    _tile_loadd(4, x + at, tile_line_bytes);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, beside + at, tile_line_bytes);
    _tile_dpbssd(1, 4, 7);
    if constexpr (bands == 2) {
      _tile_loadd(5, below + at, tile_line_bytes);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    meanwhile();
  }
  _tile_stored(0, out.sums[0], tile_line_bytes);
  _tile_stored(1, out.sums[1], tile_line_bytes);
  if constexpr (bands == 2) {
    _tile_stored(2, out.sums[2], tile_line_bytes);
    _tile_stored(3, out.sums[3], tile_line_bytes);
  }
}

template <Packing packing>
void walk_chunks(const TileGemm& args) {
  const ChunkWalk walk{args};
  const std::int64_t bands = args.band_end - args.band_begin;
  auto& scratch = *reinterpret_cast<Scratch*>(args.scratch);
  Rescaling rescaling = begin_rescaling<packing>(walk.weights(0), walk.groups(0), &scratch.rooms[0], scratch);
  go_on<packing>(rescaling, rescaling.quarters(), scratch);
  Unloading unloading;
  std::int64_t blocks = 0;
  for (std::int64_t step = 0; step < walk.steps; ++step) {
    const std::int64_t panel = walk.panel(step), chunk = walk.chunk(step), tiles = args.x.chunk_tiles(chunk);
    const Room& room = scratch.rooms[step % 2];
    go_on(unloading, 4);  // it needs the scales of the room that the next chunk takes
    if (step + 1 < walk.steps) {
      Room* next = &scratch.rooms[(step + 1) % 2];
      rescaling = begin_rescaling<packing>(walk.weights(step + 1), walk.groups(step + 1), next, scratch);
    }
    const std::int64_t slots = 2 * ((bands + 1) / 2) * tiles;
    const std::int64_t pace = (rescaling.quarters() + slots - 1) / slots;
    PrefetchRange ahead = walk.prefetch(step + 2);
    const std::int64_t lines = ((ahead.end - ahead.next) / 64 + slots - 1) / slots;
    const auto meanwhile = [&]() __attribute__((always_inline)) {
      prefetch_lines(ahead, lines);
      go_on(unloading, 1);
      go_on<packing>(rescaling, pace, scratch);
    };
    for (int half = 0; half < 2; ++half) {
      for (std::int64_t band = args.band_begin; band < args.band_end; band += 2, ++blocks) {
        const bool pair = band + 1 < args.band_end;
        Integers& integers = scratch.integers[blocks % 2];
        settle_memory();
        const std::byte* x = args.x.tile(band, chunk);
        const std::byte* w = room.tiles + 2 * half * chunk_tiles * tile_bytes;
        pair ? multiply<2>(x, tiles, w, integers, meanwhile) : multiply<1>(x, tiles, w, integers, meanwhile);
        settle_memory();
        go_on(unloading, 4);
        float* sums =
            args.sums + ((panel * bands + band - args.band_begin) * panel_tiles + 2 * half) * tile_floats;
        unloading = {&integers,
                     sums,
                     panel_tiles * tile_floats,
                     args.x.scales(band, chunk),
                     room.scales + 2 * half * lanes,
                     chunk > 0,
                     pair ? 4 : 2,
                     0};
      }
    }
    go_on<packing>(rescaling, rescaling.quarters(), scratch);
  }
  go_on(unloading, 4);
}

}  // namespace

void tile_gemm_int8(const TileGemm& args) noexcept {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  args.weights.packing == Packing::int8 ? walk_chunks<Packing::int8>(args) : walk_chunks<Packing::int4>(args);
  _tile_release();
  settle_memory();
}

}  // namespace hrmcore::HRMCORE_ISA
