#include "ops/attention_table.cuh"

// One block a table: counts the tiles of each level, then writes each into the lines of its level.

namespace hrmcore::cuda {
namespace {

// What the kernel takes of an AttentionTable.
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

constexpr int table_shared_bytes = (2 * table_levels + 1) * static_cast<int>(sizeof(int));

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(attention_table, hrmcore::AttentionTable) {
  using namespace hrmcore::cuda;
  const auto lines = [&](std::int64_t rows) {
    return static_cast<int>(hrmcore::lines_of_table(rows, args.prefix.shape[0]));
  };
  std::int32_t* const first = args.tiles.as<std::int32_t>();
  const TableOfTiles table{args.offsets,
                           args.key_offsets,
                           args.prefix,
                           args.query_rows,
                           args.key_rows,
                           args.window,
                           {first, first + lines(args.query_rows) * hrmcore::line_ints},
                           {lines(args.query_rows), lines(args.key_rows)}};
  return launch(fill_table, {dim3(2), table_threads, table_shared_bytes}, table, stream);
}
