// The table of tiles: which 64 rows of which sequence each block takes, those that visit most rows first, so
// that no block looks for its sequence and no long one starts last. One small kernel a call makes it; the
// offsets are not read on the host.
//
// Among tiles that visit equally many others the order is left open: no result depends on it.
#pragma once

#include "ops/attention_tiles.cuh"

namespace hrmcore::cuda {

// A line: index, first_row, queries, keys | first_query, first_key, prefix, unused. An index of -1 is an empty
// line.
__device__ __forceinline__ Sequence sequence_of_line(const std::int32_t* line, int window) {
  const Packed<std::int32_t, 4> place = load_packed<4>(line), rest = load_packed<4>(line + 4);
  return {place.at[0], place.at[1], place.at[2], place.at[3], rest.at[0], rest.at[1], rest.at[2], window};
}

__device__ __forceinline__ void write_line(std::int32_t* line, const Sequence& tile) {
  store_packed<4>(line, Packed<std::int32_t, 4>{{tile.index, tile.first_row, tile.queries, tile.keys}});
  store_packed<4>(line + 4, Packed<std::int32_t, 4>{{tile.first_query, tile.first_key, tile.prefix, 0}});
}

struct TableOfTiles {
  TensorView offsets, key_offsets, prefix;
  std::int64_t query_rows, key_rows, window;
  std::int32_t* lines[2];  // over queries, over keys
  int count[2];            // how many lines there are room for
};

constexpr int table_threads = 256;
// Tiles are ordered by how many they visit, up to this many: 8,192 rows.
constexpr int table_levels = 128;

__device__ __forceinline__ Sequence sequence_at(const TableOfTiles& table, int s) {
  Sequence found{s, 0, 0, 0, 0, 0, 0, static_cast<int>(table.window)};
  found.first_query = clamped_offset(table.offsets, s, table.query_rows);
  found.first_key = clamped_offset(table.key_offsets, s, table.key_rows);
  found.queries = max(clamped_offset(table.offsets, s + 1, table.query_rows) - found.first_query, 0);
  found.keys = max(clamped_offset(table.key_offsets, s + 1, table.key_rows) - found.first_key, 0);
  found.prefix = load_one(table.prefix.as<std::int32_t>() + s);
  return found;
}

// The level of the tile at first_row: 0 is the heaviest.
__device__ __forceinline__ int level_of(const Sequence& tile, bool over_keys) {
  constexpr int side = static_cast<int>(tile_rows);
  const int rows = min((over_keys ? tile.keys : tile.queries) - tile.first_row, side);
  const Span span =
      over_keys ? tile.queries_of_block(rows, Side::all) : tile.keys_of_block(rows, Side::all, side);
  const int visits = max(span.end - span.begin + side - 1, 0) / side;
  return table_levels - 1 - min(visits, table_levels - 1);
}

// Calls f(tile) for every tile of this thread's sequences.
template <class F>
__device__ __forceinline__ void for_each_tile(const TableOfTiles& table, bool over_keys, const F& f) {
  const int sequences = static_cast<int>(table.prefix.shape[0]);
  for (int s = static_cast<int>(threadIdx.x); s < sequences; s += table_threads) {
    Sequence tile = sequence_at(table, s);
    const int rows = over_keys ? tile.keys : tile.queries;
    for (; tile.first_row < rows; tile.first_row += static_cast<int>(tile_rows)) f(tile);
  }
}

namespace {

// A block a table.
__global__ void __launch_bounds__(table_threads) fill_table(TableOfTiles table) {
  const bool over_keys = blockIdx.x == 1;
  std::int32_t* const lines = table.lines[blockIdx.x];
  const int count = table.count[blockIdx.x], thread = static_cast<int>(threadIdx.x);
  const SharedArray<int> tiles_of_level = shared_array<int>(0), next = tiles_of_level + table_levels;
  if (thread < table_levels) tiles_of_level[thread] = 0;
  __syncthreads();
  for_each_tile(table, over_keys,
                [&](const Sequence& tile) { atomicAdd(tiles_of_level.data + level_of(tile, over_keys), 1); });
  __syncthreads();
  int before = 0;
  for (int level = 0; level < min(thread, table_levels); ++level) before += tiles_of_level[level];
  if (thread <= table_levels) next[thread] = before;
  __syncthreads();
  // Offsets that do not ascend can ask for more lines than there are.
  for_each_tile(table, over_keys, [&](const Sequence& tile) {
    const int line = atomicAdd(next.data + level_of(tile, over_keys), 1);
    if (line < count) write_line(lines + line * line_ints, tile);
  });
  for (int line = next[table_levels] + thread; line < count; line += table_threads) {
    write_line(lines + line * line_ints, {-1, 0, 0, 0, 0, 0, 0, 0});
  }
}

}  // namespace

constexpr int table_shared_bytes = (2 * table_levels + 1) * static_cast<int>(sizeof(int));

// Fills the table over queries, and behind it the one over keys where it is asked for.
template <class Args>
const char* launch_fill_table(const Args& args, bool with_keys, void* stream) {
  const auto lines = [&](const TensorView& rows) {
    return static_cast<int>(lines_of_table(rows.shape[0], args.prefix.shape[0]));
  };
  std::int32_t* const first = args.tiles.template as<std::int32_t>();
  const TableOfTiles table{args.offsets,
                           args.key_offsets,
                           args.prefix,
                           args.q.shape[0],
                           args.k.shape[0],
                           args.window,
                           {first, first + lines(args.q) * line_ints},
                           {lines(args.q), lines(args.k)}};
  return launch(fill_table, {dim3(with_keys ? 2 : 1), table_threads, table_shared_bytes}, table, stream);
}

}  // namespace hrmcore::cuda
