#include "gemm/chunk_walk.h"
#include "gemm/rescale.h"
#include "gemm/tile_unit.h"

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
  RowShares shares;
};
static_assert(sizeof(Scratch) <= tile_scratch_bytes, "the scratch must hold it");

// A panel's chunk on its way to a room. It goes in quarters of a tile, between the products of the chunk
// before it.
struct Rescaling {
  const std::byte* from;
  Room* to;
  std::int64_t groups, next;

  std::int64_t quarters() const { return groups * panel_tiles * 2; }
};

template <Packing packing>
HRMCORE_INLINE Rescaling begin_rescaling(const std::byte* from, std::int64_t groups, Room* to,
                                         Scratch& scratch) {
  find_shares<packing>(from, groups, scratch.shares, to->scales);
  return {from, to, groups, 0};
}

// Sixteen rows, four columns: a line of a tile.
template <Packing packing>
HRMCORE_INLINE void rescale_quarter(Rescaling& r, const Scratch& scratch) {
  constexpr std::int64_t slabs = slabs_of(packing) / 2;
  const std::int64_t group = r.next / (panel_tiles * 2), tile = r.next / 2 % panel_tiles, half = r.next % 2;
  ++r.next;
  const Halves shares = load_shares(scratch.shares, group, tile * lanes);
  const std::byte* cells =
      r.from + group * group_bytes(packing) + half * slabs * slab_bytes + tile * tile_line_bytes;
  std::byte* out = r.to->tiles + (tile * chunk_tiles + group / 2) * tile_bytes +
                   (group % 2 * 8 + half * 4) * tile_line_bytes;
  const auto put = [&](int, const Halves& weights) __attribute__((always_inline)) {
    const vint line = pack(weights);
    __builtin_memcpy(out, &line, sizeof(line));
    out += tile_line_bytes;
  };
#pragma GCC unroll 4
  for (std::int64_t slab = 0; slab < slabs; ++slab, cells += slab_bytes) rescale<packing>(cells, shares, put);
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

// One or two bands of x by two tiles' breadth of w, as in tile_unit.h.
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
  const std::int64_t bands = args.bands(), band_end = args.band_begin + bands;
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
      for (std::int64_t band = args.band_begin; band < band_end; band += 2, ++blocks) {
        const bool pair = band + 1 < band_end;
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
  const TileUnit unit;
  args.weights.packing == Packing::int8 ? walk_chunks<Packing::int8>(args) : walk_chunks<Packing::int4>(args);
  settle_memory();
}

}  // namespace hrmcore::HRMCORE_ISA
