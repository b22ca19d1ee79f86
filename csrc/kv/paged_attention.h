// Attention over the paged KV cache, for the tokens of one step.
//
// A page holds 64 consecutive tokens of a request for every slot, and in it for each slot and head:
//   keys    one panel of weight_layout.h (f32, bf16 or int8): the 64 tokens are its rows, the head's channels
//           its columns
//   values  [64][d'] in f32 or bf16; or int8, then a float32 scale for each token; d' is d rounded up to 32
//
// Under xPos (PagedXpos) a key is stored decayed by its distance to the end of its span of pages; a query is
// decayed by its distance to the start of its own span, once, and by what lies between the two edges when it
// comes to another span, which is 1 - span tokens in its own. Keys after the query are decayed to the start
// of their span instead, from what is stored, and the query to the end of its own: that happens to prefixes
// only. A window W hides from query i the keys j with |floor(i / W) - floor(j / W)| > 1.
//
//   append_tokens  turns q and k by their position (RoPE, half split), multiplies q by 1/sqrt(d) and stores
//                  k and v
//   attend         out = sigmoid(gate) * softmax(q k^T) v,  key j visible to query i iff
//                  j < max(prefix, i + 1)
//
// attend takes the pages in order with a running maximum, so a query's bits do not depend on how many
// stand beside it. It reads each visible key and value once for up to `query_tile` queries.
// Sources: arXiv 2104.09864, 2205.14135.
#pragma once

#include <vector>

#include "core/isa.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

constexpr std::int64_t page_tokens = panel_rows;
constexpr std::int64_t most_head_channels = 256;
constexpr std::int64_t query_tile = 12;

struct CacheShape {
  Packing packing;  // f32, bf16 or int8
  std::int64_t slots, heads, head_dim;

  std::int64_t channels() const { return groups_of(head_dim) * group_columns; }
  std::int64_t key_bytes() const { return groups_of(head_dim) * group_bytes(packing); }
  std::int64_t value_bytes() const {
    const std::int64_t one = packing == Packing::f32 ? 4 : packing == Packing::bf16 ? 2 : 1;
    return page_tokens * (channels() * one + (packing == Packing::int8 ? 4 : 0));
  }
  std::int64_t head_bytes() const { return key_bytes() + value_bytes(); }
  std::int64_t slot_bytes() const { return heads * head_bytes(); }
  std::int64_t page_bytes() const { return slots * slot_bytes(); }
};

// Where one token of a step belongs.
struct TokenPlace {
  std::byte* page;        // of its request
  std::int64_t position;  // in its request
};

// xPos: a score decays by exp(log_decay_c * distance) in channel c.
struct PagedXpos {
  // log_decay: (head_dim / 2), none positive. Zero beyond head_dim, where queries are zero, too.
  PagedXpos(const float* log_decay, std::int64_t head_dim, std::int64_t positions);

  // Tokens, whole pages: as many as the fastest channel halves over, for a query is decayed and quantised
  // anew for each span, and what is left of that channel in an int8 key has lost a bit at most. One page at
  // least.
  std::int64_t span;
  // exp(log_decay * distance), distances 0 to span - 1: [distance][channels]
  std::vector<float> over;
  // What makes keys that are decayed to the end of their span those decayed to its start: [channels][span]
  std::vector<float> to_start;
  // Between the facing edges of two spans that are so many spans apart: [spans][channels]. What is too small
  // to count is zero, so that no product with it is denormal.
  std::vector<float> between;
};

// What decays a token to the start (side 0) or the end (1) of its span: [channels].
[[maybe_unused]] static const float* xpos_to_edge(const PagedXpos& xpos, std::int64_t channels,
                                                  std::int64_t position, int side) {
  const std::int64_t index = position % xpos.span;
  return xpos.over.data() + (side == 0 ? index : xpos.span - 1 - index) * channels;
}

// And between there and the facing edge of another span, or of its own, which is behind it: [channels].
[[maybe_unused]] static const float* xpos_between(const PagedXpos& xpos, std::int64_t channels,
                                                  std::int64_t position, std::int64_t span) {
  const std::int64_t own = position / xpos.span, apart = own > span ? own - span : span - own;
  return xpos.between.data() + apart * channels;
}

struct AppendTokens {
  CacheShape shape;
  const PagedXpos* xpos;  // null: RoPE
  std::int64_t slot;
  const TokenPlace* places;
  float* gqkv;  // [tokens][gate | q | k | v], q rewritten
  std::int64_t stride, token_begin, token_end;
  const float* rope;  // [positions][head_dim]: cos, then sin
};

struct Attend {
  CacheShape shape;
  const PagedXpos* xpos;  // null: RoPE
  std::int64_t window;    // a multiple of page_tokens; 0: none
  std::int64_t slot, head;
  const std::byte* const* pages;  // of the request
  std::int64_t start, prefix;     // tokens cached before this step; tokens that see each other both ways
  std::int64_t query_begin, query_end;  // among the request's tokens of this step
  const float* gqkv;                    // its first token
  std::int64_t stride;
  float* out;  // its first token: [tokens][heads * head_dim], written
  std::int64_t out_stride;
};

HRMCORE_DECLARE_KERNEL(append_tokens, AppendTokens)
HRMCORE_DECLARE_KERNEL(attend, Attend)

}  // namespace hrmcore
