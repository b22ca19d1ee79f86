// Attention among the tokens of a prefix on AMX, the processor's matrix unit, or by the pairs of AVX-512 BF16: what
// paged_attention.h defines, for a bfloat16 or int8 cache.
//
// Queries, and xPos's keys that stand after a query, are rounded to bfloat16 when they are decayed; scores,
// softmax and sums are float32; the weights of the keys, times their values' scales where those are int8, are
// rounded to bfloat16. A query visits its keys in pieces of 256, from the first one that its window shows it
// (under xPos they end with spans, too), with a running maximum: a query's bits follow from its position and
// the prefix alone.
//
// Reads each visible key and value once for up to prefix_queries queries; 4 d' FLOPs a key and query, at
// 1,024 a cycle on AMX and 64 by pairs, beside an exponential for each; where queries meet themselves under
// xPos, twice for 32 keys. Source: arXiv 2205.14135.
#pragma once

#include "core/isa.h"
#include "gemm/row_tiles.h"
#include "kv/paged_attention.h"

namespace hrmcore {

constexpr std::int64_t prefix_queries = 128;
constexpr std::int64_t prefix_keys = 256;

struct AttendPrefix {
  CacheShape shape;
  const PagedXpos* xpos;  // null: RoPE
  std::int64_t window;    // a multiple of page_tokens; 0: none
  std::int64_t slot, head;
  const std::byte* const* pages;        // of the request
  std::int64_t prefix;                  // tokens, all of them cached
  std::int64_t query_begin, query_end;  // positions, at most prefix_queries, the first a multiple of them
  const float* gqkv;                    // of position 0
  std::int64_t stride;
  float* out;  // of position 0: [tokens][heads * head_dim], written
  std::int64_t out_stride;
  std::byte* scratch;  // prefix_scratch_bytes, private to the thread, 64-byte aligned
};

// Tiles of queries and keys, for either side, values and weights; scores of two bands; sums.
[[maybe_unused]] static std::int64_t prefix_scratch_bytes(const CacheShape& shape) {
  const std::int64_t half = 2, full = 4, channels = shape.channels();
  return (2 * prefix_queries + 3 * prefix_keys) * channels * half +
         2 * band_rows * prefix_keys * (half + full) + prefix_queries * channels * full;
}

HRMCORE_DECLARE_BF16_KERNEL(attend_prefix, AttendPrefix)

}  // namespace hrmcore
