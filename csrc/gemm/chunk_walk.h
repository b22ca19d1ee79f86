// The order in which a GEMM in tiles takes its weights.
#pragma once

#include "gemm/prefetch.h"
#include "gemm/tile_gemm.h"

namespace hrmcore::HRMCORE_ISA {

// A step is a chunk of a panel: all panels of the first chunk come first, then those of the next.
struct ChunkWalk {
  const TileGemm& args;
  std::int64_t panels = args.panel_end - args.panel_begin;
  std::int64_t steps = args.x.chunks() * panels;

  std::int64_t chunk(std::int64_t step) const { return step / panels; }
  std::int64_t panel(std::int64_t step) const { return step % panels; }
  std::int64_t groups(std::int64_t step) const {
    const std::int64_t left = args.weights.groups() - chunk(step) * tile_chunk_groups;
    return left < tile_chunk_groups ? left : tile_chunk_groups;
  }
  const std::byte* weights(std::int64_t step) const {
    return args.weights.data + (args.panel_begin + panel(step)) * args.weights.panel_bytes() +
           chunk(step) * tile_chunk_groups * group_bytes(args.weights.packing);
  }
  // A step's weights, to be asked for ahead; nothing beyond the last.
  PrefetchRange prefetch(std::int64_t step) const {
    if (step >= steps) return {};
    const std::byte* from = weights(step);
    return {from, from + groups(step) * group_bytes(args.weights.packing)};
  }
};

}  // namespace hrmcore::HRMCORE_ISA
