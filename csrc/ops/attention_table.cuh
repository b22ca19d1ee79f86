// The table of tiles (AttentionTable in ops/attention.h): no block looks for its sequence and no long one starts
// last. One small kernel makes it; the offsets are not read on the host.
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

}  // namespace hrmcore::cuda
