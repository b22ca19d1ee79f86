#include "kv/paged_attention.h"

#if defined(HRMCORE_ISA_generic)
#include <algorithm>
#include <cmath>
#endif

#include "gemm/gemm_chunk.h"
#include "gemm/lanes.h"
#include "gemm/prefetch.h"
#include "gemm/quantise.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

constexpr std::int64_t most_span_pages = 8;  // the table of a span stays within the second-level cache

std::int64_t span_of(const float* log_decay, std::int64_t count) {
  const double fastest = *std::min_element(log_decay, log_decay + count);
  const double halved = fastest < 0 ? std::log(0.5) / fastest / page_tokens : most_span_pages;
  const auto pages = static_cast<std::int64_t>(std::min<double>(halved, most_span_pages));
  return std::max<std::int64_t>(pages, 1) * page_tokens;
}

}  // namespace

PagedXpos::PagedXpos(const float* log_decay, std::int64_t head_dim, std::int64_t positions)
    : span(span_of(log_decay, head_dim / 2)) {
  const std::int64_t channels = groups_of(head_dim) * group_columns, spans = (positions + span - 1) / span;
  over.resize(static_cast<std::size_t>(span * channels));
  to_start.resize(over.size());
  between.resize(static_cast<std::size_t>(spans * channels));
  for (std::int64_t c = 0; c < channels; ++c) {
    const double rate = c < head_dim ? static_cast<double>(log_decay[c % (head_dim / 2)]) : 0.0;
    const auto decay = [rate](std::int64_t distance) {
      const double exponent = rate * static_cast<double>(distance);
      return exponent < -64.0 ? 0.0f : static_cast<float>(std::exp(exponent));
    };
    for (std::int64_t distance = 0; distance < span; ++distance) {
      over[static_cast<std::size_t>(distance * channels + c)] = decay(distance);
      to_start[static_cast<std::size_t>(c * span + distance)] = decay(2 * distance - span + 1);
    }
    for (std::int64_t apart = 0; apart < spans; ++apart)
      between[static_cast<std::size_t>(apart * channels + c)] = decay((apart - 1) * span + 1);
  }
}
#endif

namespace HRMCORE_ISA {
namespace {

// x turned by a position's angles into `out`, channels() wide, times `scale`.
HRMCORE_INLINE void rotate(const float* x, const float* angles, std::int64_t dim, float scale, float* out) {
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half], c = angles[i], s = angles[i + half];
    out[i] = (low * c - high * s) * scale;
    out[i + half] = (high * c + low * s) * scale;
  }
}

HRMCORE_INLINE std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

HRMCORE_INLINE QuantGroup quantised(const float* x) {
  vfloat values[group_vectors];
  for (int v = 0; v < group_vectors; ++v) values[v] = load(x + v * lanes);
  QuantGroup group;
  quantise_group(values, &group);
  return group;
}

void store_key(const CacheShape& shape, std::byte* panel, std::int64_t row, const float* key) {
  const std::int64_t channels = shape.channels();
  if (shape.packing == Packing::f32) {
    for (std::int64_t c = 0; c < channels; ++c)
      reinterpret_cast<float*>(panel)[c * panel_rows + row] = key[c];
  } else if (shape.packing == Packing::bf16) {
    auto* pairs = reinterpret_cast<std::uint32_t*>(panel) + row;
    for (std::int64_t c = 0; c < channels; c += 2, pairs += panel_rows)
      *pairs = to_bf16(key[c]) | static_cast<std::uint32_t>(to_bf16(key[c + 1])) << 16;
  } else {
    for (std::int64_t g = 0; g < groups_of(channels); ++g, panel += group_bytes(Packing::int8)) {
      // The scale is kept in bfloat16 like a weight's, so it is rounded before the division.
      float top = 0;
      for (int c = 0; c < group_columns; ++c) {
        const float magnitude = __builtin_fabsf(key[g * group_columns + c]);
        top = magnitude > top ? magnitude : top;
      }
      const std::uint16_t bits = to_bf16(top / 127.0f);
      const bf16 stored{bits};
      std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
      float scale;
      __builtin_memcpy(&scale, &wide, sizeof(scale));
      for (int c = 0; c < group_columns; ++c) {
        float q = scale > 0 ? __builtin_rintf(key[g * group_columns + c] / scale) : 0.0f;
        q = q > 127 ? 127 : q < -127 ? -127 : q;
        panel[c / 4 * slab_bytes + row * 4 + c % 4] = static_cast<std::byte>(static_cast<int>(q) + 128);
      }
      reinterpret_cast<bf16*>(panel + 8 * slab_bytes)[row] = stored;
    }
  }
}

void store_value(const CacheShape& shape, std::byte* values, std::int64_t row, const float* value) {
  const std::int64_t channels = shape.channels();
  if (shape.packing == Packing::f32) {
    __builtin_memcpy(values + row * channels * 4, value, static_cast<std::size_t>(channels) * 4);
  } else if (shape.packing == Packing::bf16) {
    auto* to = reinterpret_cast<bf16*>(values) + row * channels;
    for (std::int64_t c = 0; c < channels; c += lanes) store(to + c, load(value + c));
  } else {
    float top = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
      const float magnitude = __builtin_fabsf(value[c]);
      top = magnitude > top ? magnitude : top;
    }
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    auto* to = reinterpret_cast<std::int8_t*>(values) + row * channels;
    for (std::int64_t c = 0; c < channels; ++c)
      to[c] = static_cast<std::int8_t>(__builtin_rintf(value[c] * inverse));
    reinterpret_cast<float*>(values + page_tokens * channels)[row] = top / 127.0f;
  }
}

using Quantised = QuantGroup[most_head_channels / group_columns];  // one query

struct QueryTile {
  alignas(64) float query[query_tile][most_head_channels];
  // Under xPos: the queries for keys before and after them, decayed within their own spans; and those for the
  // keys before them in one span.
  alignas(64) float within[2][query_tile][most_head_channels];
  alignas(64) float decayed[query_tile][most_head_channels];
  std::int64_t decayed_end;  // the first token after that span
  // A page's keys as float32, decayed to the start of their span.
  alignas(64) float panel[most_head_channels * page_tokens];
  alignas(64) Quantised quantised[query_tile];
  alignas(64) float weight[query_tile][page_tokens];  // scores, then their exponentials
  alignas(64) float out[query_tile][most_head_channels];
  float row_max[query_tile], row_sum[query_tile], rescale[query_tile];
};

// Scores of one query against one page to weights; updates the running maximum and sum.
void soften(QueryTile& tile, int query, std::int64_t visible) {
  constexpr int vectors = static_cast<int>(page_tokens) / lanes;
  float* scores = tile.weight[query];
  for (std::int64_t j = visible < 0 ? 0 : visible; j < page_tokens; ++j) scores[j] = -__builtin_inff();
  vfloat top = load(scores);
  for (int v = 1; v < vectors; ++v) top = max(top, load(scores + v * lanes));
  const float page_max = max(top);
  const float new_max = page_max > tile.row_max[query] ? page_max : tile.row_max[query];
  vfloat total = {};
  for (int v = 0; v < vectors; ++v) {
    const vfloat e = exp(load(scores + v * lanes) - new_max);
    store(scores + v * lanes, e);
    total += e;
  }
  const vfloat rescale = exp(splat(tile.row_max[query] - new_max));
  tile.rescale[query] = rescale[0];
  tile.row_sum[query] = tile.row_sum[query] * tile.rescale[query] + sum(total);
  tile.row_max[query] = new_max;
}

template <class T, int queries, int vectors>
HRMCORE_INLINE void mix_part(QueryTile& tile, int first, const T* values, std::int64_t channels,
                             std::int64_t channel, std::int64_t keys, PrefetchRange& ahead) {
  constexpr std::int64_t lines = (sizeof(T) * vectors * lanes + 63) / 64;  // of a key's part
  vfloat sums[queries][vectors];
#pragma GCC unroll 12
  for (int q = 0; q < queries; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      sums[q][v] = load(tile.out[first + q] + channel + v * lanes) * tile.rescale[first + q];
  }
  for (std::int64_t j = 0; j < keys; ++j) {
    prefetch_lines(ahead, lines);
    vfloat value[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) value[v] = load(values + j * channels + channel + v * lanes);
#pragma GCC unroll 12
    for (int q = 0; q < queries; ++q) {
      const vfloat weight = splat(tile.weight[first + q][j]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[q][v] = fma(weight, value[v], sums[q][v]);
    }
  }
#pragma GCC unroll 12
  for (int q = 0; q < queries; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(tile.out[first + q] + channel + v * lanes, sums[q][v]);
  }
}

template <class T, int queries, int vectors>
void mix_channels(QueryTile& tile, int first, const T* values, std::int64_t channels, std::int64_t keys,
                  PrefetchRange& ahead) {
  for (std::int64_t channel = 0; channel < channels; channel += vectors * lanes)
    mix_part<T, queries, vectors>(tile, first, values, channels, channel, keys, ahead);
}

// The queries from `query` on, `block` at a time as long as there are so many; `query` is the next one then.
template <class T, int block>
void mix_blocks(QueryTile& tile, int& query, int queries, const T* values, std::int64_t channels,
                std::int64_t keys, PrefetchRange& ahead) {
  constexpr int vectors = 32 / lanes < 4 ? 32 / lanes : 4;
  for (; query + block <= queries; query += block)
    mix_channels<T, block, vectors>(tile, query, values, channels, keys, ahead);
}

// out = out * rescale + weights * values, for all queries of the tile. Values are converted anew for each block
// of queries, so a whole tile is one where the registers hold its sums. A query alone needs more channels at a
// time for as many independent sums, and reads its values in order then.
template <class T>
void mix(QueryTile& tile, int queries, const T* values, std::int64_t channels, std::int64_t keys,
         PrefetchRange& ahead) {
  constexpr int vectors = 32 / lanes < 4 ? 32 / lanes : 4, wide = lanes == 16 ? 8 : vectors;
  int q = 0;
  if constexpr (lanes == 16) mix_blocks<T, query_tile>(tile, q, queries, values, channels, keys, ahead);
  mix_blocks<T, 4>(tile, q, queries, values, channels, keys, ahead);
  for (; q < queries; ++q) {
    if (channels % (wide * lanes) == 0) {
      mix_channels<T, 1, wide>(tile, q, values, channels, keys, ahead);
    } else {
      mix_channels<T, 1, vectors>(tile, q, values, channels, keys, ahead);
    }
  }
}

void mix_values(const CacheShape& shape, QueryTile& tile, int queries, const std::byte* values,
                std::int64_t keys, PrefetchRange& ahead) {
  const std::int64_t channels = shape.channels();
  if (shape.packing == Packing::f32) {
    mix(tile, queries, reinterpret_cast<const float*>(values), channels, keys, ahead);
  } else if (shape.packing == Packing::bf16) {
    mix(tile, queries, reinterpret_cast<const bf16*>(values), channels, keys, ahead);
  } else {
    const auto* scales = reinterpret_cast<const float*>(values + page_tokens * channels);
    for (int q = 0; q < queries; ++q) {
      for (std::int64_t j = 0; j < keys; ++j) tile.weight[q][j] *= scales[j];
    }
    mix(tile, queries, reinterpret_cast<const std::int8_t*>(values), channels, keys, ahead);
  }
}

HRMCORE_INLINE GemmChunk chunk_of(const CacheShape& shape, const std::byte* keys, int queries, float* out) {
  GemmChunk scores{};
  scores.weights = keys;
  scores.groups = groups_of(shape.head_dim);
  scores.tokens = queries;
  scores.out = out;
  scores.out_stride = page_tokens;
  return scores;
}

// Scores of float queries [queries][most_head_channels] against keys of one packing. `streams`: the keys lie
// in the cache, their page's values right behind them.
void score_floats(const CacheShape& shape, Packing packing, const std::byte* keys, bool streams,
                  const float* query, int queries, float* out) {
  GemmChunk scores = chunk_of(shape, keys, queries, out);
  scores.x = reinterpret_cast<const std::byte*>(query);
  scores.x_row_bytes = most_head_channels * sizeof(float);
  scores.streams = streams;
  multiply_chunk(packing, scores);
}

void quantise_queries(const CacheShape& shape, const float (*query)[most_head_channels], int queries,
                      Quantised* quantised_queries) {
  for (int q = 0; q < queries; ++q) {
    for (std::int64_t g = 0; g < groups_of(shape.head_dim); ++g)
      quantised_queries[q][g] = quantised(query[q] + g * group_columns);
  }
}

// Scores against a page of the cache: of float queries, or with an int8 cache of those quantised in the
// tile.
void score_cached(const CacheShape& shape, const std::byte* keys, int queries,
                  const float (*query)[most_head_channels], QueryTile& tile) {
  if (shape.packing != Packing::int8) {
    score_floats(shape, shape.packing, keys, true, query[0], queries, tile.weight[0]);
    return;
  }
  GemmChunk scores = chunk_of(shape, keys, queries, tile.weight[0]);
  scores.x = reinterpret_cast<const std::byte*>(tile.quantised);
  scores.x_row_bytes = sizeof(Quantised);
  scores.streams = true;
  multiply_chunk(shape.packing, scores);
}

// The queries from `position` on, decayed to the edge of their own span that faces the keys before (side 0)
// or after them (1).
void decay_within(const PagedXpos& xpos, std::int64_t channels, std::int64_t position, int queries, int side,
                  QueryTile& tile) {
  for (int q = 0; q < queries; ++q) {
    const float* over = xpos_to_edge(xpos, channels, position + q, side);
    for (std::int64_t c = 0; c < channels; c += lanes)
      store(tile.within[side][q] + c, load(tile.query[q] + c) * load(over + c));
  }
}

// Those for a span on that side. A query's bits depend on its own position alone.
void decay_between(const PagedXpos& xpos, std::int64_t channels, std::int64_t position, int queries, int side,
                   std::int64_t span, const QueryTile& tile, float (*decayed)[most_head_channels]) {
  for (int q = 0; q < queries; ++q) {
    const float* between = xpos_between(xpos, channels, position + q, span);
    for (std::int64_t c = 0; c < channels; c += lanes)
      store(decayed[q] + c, load(tile.within[side][q] + c) * load(between + c));
  }
}

// A page's keys as float32, decayed to the start of their span: [channel][row]. `to_start`: of the page's
// rows.
void expand_keys(const CacheShape& shape, const std::byte* keys, const float* to_start, std::int64_t span,
                 float* panel) {
  const auto put = [&](std::int64_t channel, std::int64_t row, vfloat key) __attribute__((always_inline)) {
    store(panel + channel * page_tokens + row, key * load(to_start + channel * span + row));
  };
  const std::int64_t channels = shape.channels();
  for (std::int64_t row = 0; row < page_tokens; row += lanes) {
    if (shape.packing == Packing::f32) {
      for (std::int64_t c = 0; c < channels; ++c)
        put(c, row, load(reinterpret_cast<const float*>(keys) + c * page_tokens + row));
    } else if (shape.packing == Packing::bf16) {
      for (std::int64_t c = 0; c < channels; c += 2) {
        const vint cells = load_bits(keys + (c / 2 * page_tokens + row) * 4);
        put(c, row, low_half(cells));
        put(c + 1, row, high_half(cells));
      }
    } else {
      for (std::int64_t c = 0; c < channels; c += 4) {
        const std::byte* group = keys + c / group_columns * group_bytes(Packing::int8);
        const vfloat scale = load(reinterpret_cast<const bf16*>(group + 8 * slab_bytes) + row);
        const vint cells = load_bits(group + c % group_columns / 4 * slab_bytes + row * 4);
        for (int byte = 0; byte < 4; ++byte)
          put(c + byte, row, to_float(((cells >> (8 * byte)) & 255) - 128) * scale);
      }
    }
  }
}

// Puts the scores of the keys that stand after their query over those that `weight` has for them.
void score_after(const Attend& args, const std::byte* keys, std::int64_t page, std::int64_t position,
                 int queries, QueryTile& tile) {
  const CacheShape& shape = args.shape;
  const PagedXpos& xpos = *args.xpos;
  const std::int64_t first_key = page * page_tokens, span = first_key / xpos.span;
  alignas(64) float decayed[query_tile][most_head_channels];
  decay_between(xpos, shape.channels(), position, queries, 1, span, tile, decayed);
  expand_keys(shape, keys, xpos.to_start.data() + first_key % xpos.span, xpos.span, tile.panel);
  alignas(64) float scores[query_tile][page_tokens];
  score_floats(shape, Packing::f32, reinterpret_cast<const std::byte*>(tile.panel), false, decayed[0],
               queries, scores[0]);
  for (int q = 0; q < queries; ++q) {
    const std::int64_t first = position + q + 1 - first_key;
    for (std::int64_t row = first > 0 ? first : 0; row < page_tokens; ++row)
      tile.weight[q][row] = scores[q][row];
  }
}

// Scores of a page under xPos, of the queries from `position` on. `most`: keys that any of them sees.
void score_xpos(const Attend& args, const std::byte* keys, std::int64_t page, std::int64_t position,
                int queries, std::int64_t most, QueryTile& tile) {
  const std::int64_t first_key = page * page_tokens;
  if (first_key < position + queries) {
    if (first_key >= tile.decayed_end) {
      const std::int64_t span = first_key / args.xpos->span;
      decay_between(*args.xpos, args.shape.channels(), position, queries, 0, span, tile, tile.decayed);
      if (args.shape.packing == Packing::int8)
        quantise_queries(args.shape, tile.decayed, queries, tile.quantised);
      tile.decayed_end = (span + 1) * args.xpos->span;
    }
    score_cached(args.shape, keys, queries, tile.decayed, tile);
  }
  const std::int64_t end = first_key + page_tokens < most ? first_key + page_tokens : most;
  if (args.prefix > position + 1 && end > position + 1)
    score_after(args, keys, page, position, queries, tile);
}

// Queries that one window serves, if there is one.
void attend_tile(const Attend& args, std::int64_t first, int queries, QueryTile& tile) {
  const CacheShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim, channels = shape.channels(), width = shape.heads * dim;
  const auto bytes = static_cast<std::size_t>(dim) * sizeof(float);
  for (int q = 0; q < queries; ++q) {
    __builtin_memset(tile.query[q], 0, sizeof(tile.query[q]));
    __builtin_memset(tile.out[q], 0, sizeof(tile.out[q]));
    __builtin_memcpy(tile.query[q], args.gqkv + (first + q) * args.stride + width + args.head * dim, bytes);
    tile.row_max[q] = -__builtin_inff();
    tile.row_sum[q] = 0;
  }
  const std::int64_t position = args.start + first, window = args.window;
  if (args.xpos != nullptr) {
    tile.decayed_end = 0;
    for (int side = 0; side <= (args.prefix > position + 1 ? 1 : 0); ++side)
      decay_within(*args.xpos, channels, position, queries, side, tile);
  } else if (shape.packing == Packing::int8) {
    quantise_queries(shape, tile.query, queries, tile.quantised);
  }
  const std::int64_t last = position + queries;  // the tile's last query sees at least this many keys
  std::int64_t most = last > args.prefix ? last : args.prefix, page = 0;
  if (window > 0) {
    const std::int64_t own = position / window;
    most = most < (own + 2) * window ? most : (own + 2) * window;
    page = own > 0 ? (own - 1) * window / page_tokens : 0;
  }
  const auto keys_of = [&](std::int64_t index) __attribute__((always_inline)) {
    return args.pages[index] + args.slot * shape.slot_bytes() + args.head * shape.head_bytes();
  };
  for (; page * page_tokens < most; ++page) {
    const std::byte* keys = keys_of(page);
    PrefetchRange ahead;
    if ((page + 1) * page_tokens < most) {
      ahead.next = keys_of(page + 1);
      ahead.end = ahead.next + shape.key_bytes();
    }
    if (args.xpos == nullptr) {
      score_cached(shape, keys, queries, tile.query, tile);
    } else {
      score_xpos(args, keys, page, position, queries, most, tile);
    }
    for (int q = 0; q < queries; ++q) {
      const std::int64_t causal = position + q + 1;
      const std::int64_t seen = causal > args.prefix ? causal : args.prefix;
      soften(tile, q, (seen < most ? seen : most) - page * page_tokens);
    }
    const std::int64_t left = most - page * page_tokens;
    mix_values(shape, tile, queries, keys + shape.key_bytes(), left < page_tokens ? left : page_tokens,
               ahead);
  }
  for (int q = 0; q < queries; ++q) {
    float* gate = tile.query[q];
    __builtin_memcpy(gate, args.gqkv + (first + q) * args.stride + args.head * dim, bytes);
    for (std::int64_t c = 0; c < channels; c += lanes) {
      store(tile.out[q] + c, load(tile.out[q] + c) / tile.row_sum[q] * sigmoid(load(gate + c)));
    }
    __builtin_memcpy(args.out + (first + q) * args.out_stride + args.head * dim, tile.out[q], bytes);
  }
}

}  // namespace

void append_tokens(const AppendTokens& args) noexcept {
  const CacheShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim, width = shape.heads * dim;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  alignas(64) float row[most_head_channels] = {};
  for (std::int64_t token = args.token_begin; token < args.token_end; ++token) {
    const TokenPlace& place = args.places[token];
    const float* angles = args.rope + place.position * dim;
    const std::int64_t index = place.position % page_tokens;
    const float* decay =
        args.xpos == nullptr ? nullptr : xpos_to_edge(*args.xpos, shape.channels(), place.position, 1);
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      std::byte* keys = place.page + args.slot * shape.slot_bytes() + head * shape.head_bytes();
      float* q = args.gqkv + token * args.stride + width + head * dim;
      rotate(q, angles, dim, scale, row);
      __builtin_memcpy(q, row, static_cast<std::size_t>(dim) * sizeof(float));
      rotate(q + width, angles, dim, 1.0f, row);
      if (decay != nullptr) {
        for (std::int64_t c = 0; c < dim; ++c) row[c] *= decay[c];
      }
      store_key(shape, keys, index, row);
      __builtin_memcpy(row, q + 2 * width, static_cast<std::size_t>(dim) * sizeof(float));
      store_value(shape, keys + shape.key_bytes(), index, row);
    }
  }
}

void attend(const Attend& args) noexcept {
  QueryTile tile;
  for (std::int64_t query = args.query_begin; query < args.query_end;) {
    std::int64_t count = args.query_end - query < query_tile ? args.query_end - query : query_tile;
    if (args.window > 0) {
      const std::int64_t left = args.window - (args.start + query) % args.window;
      count = left < count ? left : count;
    }
    attend_tile(args, query, static_cast<int>(count), tile);
    query += count;
  }
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
