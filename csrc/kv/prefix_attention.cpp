#include "kv/prefix_attention.h"

#include "gemm/tile_unit.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr std::int64_t key_tiles = prefix_keys / lanes, key_groups = prefix_keys / group_columns;
constexpr std::int64_t group_tiles = group_columns / lanes;

// The scratch, and what else is known of each query. Under xPos queries and keys are decayed to an edge of
// the keys' span: side 0 for keys up to their query, to the span's end; side 1 for those after it, to its
// start.
struct Room {
  std::byte* queries[2];  // [bands][channel groups] tiles
  std::byte* keys[2];     // [16 keys][channel groups] tiles
  std::byte* values;      // [16 channels][key groups] tiles
  std::byte* weights;     // [2 bands][key groups] tiles
  float* scores;          // [2 bands][16 keys][16][16]
  float* sums;            // [bands][16 channels][16][16]
  alignas(64) float row_max[prefix_queries], row_sum[prefix_queries];
  alignas(64) float scale[prefix_keys];      // of the values
  alignas(64) float after[4 * tile_floats];  // scores of side 1 where queries meet themselves

  Room(const CacheShape& shape, std::byte* scratch) {
    const std::int64_t row_bytes = 2 * shape.channels();
    queries[0] = scratch;
    queries[1] = queries[0] + prefix_queries * row_bytes;
    keys[0] = queries[1] + prefix_queries * row_bytes;
    keys[1] = keys[0] + prefix_keys * row_bytes;
    values = keys[1] + prefix_keys * row_bytes;
    weights = values + prefix_keys * row_bytes;
    scores = reinterpret_cast<float*>(weights + 2 * key_groups * tile_bytes);
    sums = scores + 2 * key_tiles * tile_floats;
  }
};

// Queries that see the same keys, from position `first` on.
struct Part {
  const AttendPrefix& args;
  std::int64_t first, queries, groups, channel_tiles;
};

const std::byte* cached(const AttendPrefix& args, std::int64_t page) {
  return args.pages[page] + args.slot * args.shape.slot_bytes() + args.head * args.shape.head_bytes();
}

// head_dim floats of a row from `column` on, with zeros up to the channels' end.
HRMCORE_INLINE void take_row(const AttendPrefix& args, std::int64_t position, std::int64_t column,
                             float* row) {
  const std::int64_t dim = args.shape.head_dim;
  __builtin_memcpy(row, args.gqkv + position * args.stride + column + args.head * dim,
                   static_cast<std::size_t>(dim) * sizeof(float));
  for (std::int64_t c = dim; c < args.shape.channels(); ++c) row[c] = 0;
}

// Queries as they are, or decayed for keys of `span`.
void load_queries(const Part& part, Room& room, std::int64_t span, int side) {
  const AttendPrefix& args = part.args;
  const std::int64_t channels = args.shape.channels();
  alignas(64) float row[most_head_channels];
  for (std::int64_t q = 0; q < part.queries; ++q) {
    take_row(args, part.first + q, args.shape.heads * args.shape.head_dim, row);
    if (args.xpos != nullptr) {
      const float* within = xpos_to_edge(*args.xpos, channels, part.first + q, side);
      const float* between = xpos_between(*args.xpos, channels, part.first + q, span);
      for (std::int64_t c = 0; c < channels; c += lanes)
        store(row + c, load(row + c) * load(within + c) * load(between + c));
    }
    std::byte* line =
        room.queries[side] + q / band_rows * part.groups * tile_bytes + q % band_rows * tile_line_bytes;
    for (std::int64_t group = 0; group < part.groups; ++group, line += tile_bytes)
      put_pair(load(row + group * group_columns), load(row + group * group_columns + lanes), line);
  }
}

template <Packing packing>
void load_keys(const Part& part, Room& room, std::int64_t first, std::int64_t count) {
  Widening widening;
  set_order(widening);
  widening.to = room.keys[0];
  widening.groups = part.groups;
  for (std::int64_t key = 0; key < count; key += page_tokens) {
    widening.from = cached(part.args, (first + key) / page_tokens);
    widening.next = 0;
    widen_to<packing>(widening, widening.quarters());
    widening.to += panel_tiles * part.groups * tile_bytes;
  }
}

// Keys of side 0 as those of side 1.
void decay_keys(const Part& part, Room& room, std::int64_t first, std::int64_t count) {
  const PagedXpos& xpos = *part.args.xpos;
  const std::byte* from = room.keys[0];
  std::byte* to = room.keys[1];
  for (std::int64_t key = 0; key < count; key += lanes) {
    const float* to_start = xpos.to_start.data() + (first + key) % xpos.span;
    for (std::int64_t channel = 0; channel < part.args.shape.channels(); channel += 2) {
      const vint pairs = load_bits(from);
      put_interleaved(low_half(pairs) * load(to_start + channel * xpos.span),
                      high_half(pairs) * load(to_start + (channel + 1) * xpos.span), to);
      from += tile_line_bytes;
      to += tile_line_bytes;
    }
  }
}

// Sixteen channels of a value as the bits of bfloat16; exact.
template <Packing packing>
HRMCORE_INLINE vuint value_bits(const std::byte* values, std::int64_t index) {
  if constexpr (packing == Packing::bf16) {
    vhalf halves;
    __builtin_memcpy(&halves, values + 2 * index, sizeof(halves));
    return __builtin_convertvector(halves, vuint);
  }
  return (vuint)load(reinterpret_cast<const std::int8_t*>(values) + index) >> 16;
}

// Values in pairs of keys. Those that no one may see are zero, whatever the cache holds there.
template <Packing packing>
void load_values(const Part& part, Room& room, std::int64_t first, std::int64_t count) {
  const CacheShape& shape = part.args.shape;
  const std::int64_t channels = shape.channels();
  for (std::int64_t key = 0; key < groups_of(count) * group_columns; key += 2) {
    const std::byte* values = cached(part.args, (first + key) / page_tokens) + shape.key_bytes();
    const std::int64_t row = (first + key) % page_tokens;
    const std::uint32_t shown[2] = {key < count ? ~0u : 0u, key + 1 < count ? ~0u : 0u};
    std::byte* line =
        room.values + key / group_columns * tile_bytes + key % group_columns / 2 * tile_line_bytes;
    for (std::int64_t c = 0; c < channels; c += lanes, line += key_groups * tile_bytes) {
      const vuint even = value_bits<packing>(values, row * channels + c) & shown[0];
      const vuint odd = value_bits<packing>(values, (row + 1) * channels + c) & shown[1];
      const vuint pairs = even | odd << 16;
      __builtin_memcpy(line, &pairs, sizeof(pairs));
    }
    if constexpr (packing == Packing::int8) {
      const auto* scales = reinterpret_cast<const float*>(values + page_tokens * channels) + row;
      room.scale[key] = shown[0] != 0 ? scales[0] : 0.0f;
      room.scale[key + 1] = shown[1] != 0 ? scales[1] : 0.0f;
    }
  }
}

// One query's scores to the keys' weights; sums so far shrink where a greater score has come.
template <Packing packing>
HRMCORE_INLINE void soften(const Part& part, Room& room, std::int64_t query, std::int64_t keys) {
  const std::int64_t row = query % (2 * band_rows), groups = groups_of(keys), tiles = groups * group_tiles;
  float* scores = room.scores + row / band_rows * key_tiles * tile_floats + row % band_rows * lanes;
  for (std::int64_t key = keys; key < tiles * lanes; ++key)
    scores[key / lanes * tile_floats + key % lanes] = -__builtin_inff();
  vfloat most = load(scores);
  for (std::int64_t tile = 1; tile < tiles; ++tile) most = max(most, load(scores + tile * tile_floats));
  const float here = max(most), before = room.row_max[query];
  const float new_max = here > before ? here : before;
  vfloat total = {};
  std::byte* line =
      room.weights + row / band_rows * key_groups * tile_bytes + row % band_rows * tile_line_bytes;
  for (std::int64_t group = 0; group < groups; ++group, line += tile_bytes) {
    vfloat weights[group_tiles];
#pragma GCC unroll 2
    for (int i = 0; i < group_tiles; ++i) {
      weights[i] = exp(load(scores + (group * group_tiles + i) * tile_floats) - new_max);
      total += weights[i];
      if constexpr (packing == Packing::int8)
        weights[i] *= load(room.scale + group * group_columns + i * lanes);
    }
    put_pair(weights[0], weights[1], line);
  }
  const vfloat rescale = exp(splat(before - new_max));
  room.row_sum[query] = room.row_sum[query] * rescale[0] + sum(total);
  room.row_max[query] = new_max;
  if (before == new_max || before == -__builtin_inff()) return;
  float* sums = room.sums + query / band_rows * part.channel_tiles * tile_floats + query % band_rows * lanes;
  for (std::int64_t tile = 0; tile < part.channel_tiles; ++tile, sums += tile_floats)
    store(sums, load(sums) * rescale);
}

// Scores of two bands of queries that are among these 32 keys: those after a query are side 1's.
void meet(Room& room, Block block, std::int64_t queries_step, std::int64_t keys_step) {
  const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float* scores = block.sums;
  block.x = room.queries[1] + queries_step;
  block.w = room.keys[1] + keys_step;
  block.sums = room.after;
  block.sums_step = 2 * tile_floats;
  multiply_block<2>(block, []() __attribute__((always_inline)) {});
  settle_memory();
  for (std::int64_t query = 0; query < 2 * band_rows; ++query) {
    const std::int64_t band = query / band_rows, line = query % band_rows * lanes;
    for (std::int64_t tile = band; tile < 2; ++tile) {
      float* into = scores + band * key_tiles * tile_floats + tile * tile_floats + line;
      const vfloat after = load(room.after + (2 * band + tile) * tile_floats + line);
      const vint is_after = lane + static_cast<int>(tile * lanes) > static_cast<int>(query);
      store(into, is_after ? after : load(into));
    }
  }
}

// Two bands of queries against the keys from `key` on.
void score(const Part& part, Room& room, std::int64_t band, std::int64_t key, std::int64_t keys) {
  const std::int64_t column = part.groups * tile_bytes, first = part.first + band * band_rows;
  for (std::int64_t tile = 0; tile < groups_of(keys) * group_tiles; tile += 2) {
    const std::int64_t ahead = part.args.xpos == nullptr ? -1 : key + tile * lanes - first;
    const int side = ahead > 0 ? 1 : 0;
    const Block block{
        room.queries[side] + band * column, room.keys[side] + tile * column, column, column, part.groups,
        room.scores + tile * tile_floats,   key_tiles * tile_floats,         false};
    multiply_block<2>(block, []() __attribute__((always_inline)) {});
    if (ahead == 0) meet(room, block, band * column, tile * column);
  }
}

// Two bands of queries against the keys from `key` on.
template <Packing packing>
void visit_keys(const Part& part, Room& room, std::int64_t band, std::int64_t key, std::int64_t keys,
                bool first) {
  const std::int64_t groups = groups_of(keys);
  score(part, room, band, key, keys);
  const std::int64_t begin = band * band_rows, end = begin + 2 * band_rows;
  for (std::int64_t query = begin; query < (end < part.queries ? end : part.queries); ++query)
    soften<packing>(part, room, query, keys);
  settle_memory();
  Block mixed{room.weights,
              room.values,
              key_groups * tile_bytes,
              key_groups * tile_bytes,
              groups,
              room.sums + band * part.channel_tiles * tile_floats,
              part.channel_tiles * tile_floats,
              !first};
  for (std::int64_t tile = 0; tile < part.channel_tiles; tile += 2) {
    multiply_block<2>(mixed, []() __attribute__((always_inline)) {});
    mixed.w += 2 * key_groups * tile_bytes;
    mixed.sums += 2 * tile_floats;
  }
}

// Gate, and out.
void finish(const Part& part, const Room& room) {
  alignas(64) float row[most_head_channels];
  const std::int64_t dim = part.args.shape.head_dim;
  for (std::int64_t q = 0; q < part.queries; ++q) {
    take_row(part.args, part.first + q, 0, row);
    const float* sums = room.sums + q / band_rows * part.channel_tiles * tile_floats + q % band_rows * lanes;
    for (float* c = row; c < row + part.args.shape.channels(); c += lanes, sums += tile_floats)
      store(c, load(sums) / room.row_sum[q] * sigmoid(load(c)));
    __builtin_memcpy(part.args.out + (part.first + q) * part.args.out_stride + part.args.head * dim, row,
                     static_cast<std::size_t>(dim) * sizeof(float));
  }
}

// Queries and keys of the sides that these keys stand on.
template <Packing packing>
void load_sides(const Part& part, Room& room, std::int64_t key, std::int64_t keys) {
  load_keys<packing>(part, room, key, keys);
  const PagedXpos* xpos = part.args.xpos;
  if (xpos == nullptr) return;
  const std::int64_t span = key / xpos->span;
  if (key < part.first + part.queries) load_queries(part, room, span, 0);
  if (key + keys <= part.first) return;
  load_queries(part, room, span, 1);
  decay_keys(part, room, key, keys);
}

template <Packing packing>
void attend_part(const Part& part, Room& room) {
  const AttendPrefix& args = part.args;
  for (std::int64_t q = 0; q < part.queries; ++q) {
    room.row_max[q] = -__builtin_inff();
    room.row_sum[q] = 0;
  }
  if (args.xpos == nullptr) load_queries(part, room, 0, 0);
  std::int64_t begin = 0, end = args.prefix;
  if (const std::int64_t window = args.window; window > 0) {
    const std::int64_t own = part.first / window;
    begin = own > 0 ? (own - 1) * window : 0;
    end = end < (own + 2) * window ? end : (own + 2) * window;
  }
  for (std::int64_t key = begin, keys; key < end; key += keys) {
    keys = end - key < prefix_keys ? end - key : prefix_keys;
    if (args.xpos != nullptr) {
      const std::int64_t left = args.xpos->span - key % args.xpos->span;
      keys = left < keys ? left : keys;
    }
    load_sides<packing>(part, room, key, keys);
    load_values<packing>(part, room, key, keys);
    settle_memory();
    for (std::int64_t band = 0; band < bands_of(part.queries); band += 2)
      visit_keys<packing>(part, room, band, key, keys, key == begin);
  }
  finish(part, room);
}

}  // namespace

void attend_prefix(const AttendPrefix& args) noexcept {
  const TileUnit unit;
  Room room(args.shape, args.scratch);
  for (std::int64_t query = args.query_begin; query < args.query_end;) {
    const std::int64_t left = args.window > 0 ? args.window - query % args.window : args.query_end - query;
    const std::int64_t queries = left < args.query_end - query ? left : args.query_end - query;
    const Part part{args, query, queries, groups_of(args.shape.head_dim), args.shape.channels() / lanes};
    if (args.shape.packing == Packing::int8) {
      attend_part<Packing::int8>(part, room);
    } else {
      attend_part<Packing::bf16>(part, room);
    }
    query += queries;
  }
}

}  // namespace hrmcore::HRMCORE_ISA
