#include "engine/paged_attention.h"

#include "engine/quantise.h"
#include "engine/tile.h"

namespace hrmcore::HRMCORE_ISA {
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
    auto* halves = reinterpret_cast<std::uint16_t*>(panel);
    for (std::int64_t c = 0; c < channels; ++c)
      halves[(c / 2 * panel_rows + row) * 2 + c % 2] = to_bf16(key[c]);
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
    reinterpret_cast<float*>(values + block_tokens * channels)[row] = top / 127.0f;
  }
}

typedef std::int8_t vbytes __attribute__((vector_size(lanes)));

template <class T>
HRMCORE_INLINE vfloat load_value(const T* p) {
  if constexpr (sizeof(T) == 1) {
    vbytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, vfloat);
  } else {
    return load(p);
  }
}

struct QueryTile {
  alignas(64) float query[query_tile][most_head_channels];
  alignas(64) QuantGroup quantised[query_tile][most_head_channels / group_columns];
  alignas(64) float weight[query_tile][block_tokens];  // scores, then their exponentials
  alignas(64) float out[query_tile][most_head_channels];
  float top[query_tile], total[query_tile], decay[query_tile];
};

// Scores of one query against one block to weights; updates the running maximum and sum.
void soften(QueryTile& tile, int query, std::int64_t visible) {
  constexpr int vectors = static_cast<int>(block_tokens) / lanes;
  float* scores = tile.weight[query];
  for (std::int64_t j = visible < 0 ? 0 : visible; j < block_tokens; ++j) scores[j] = -__builtin_inff();
  vfloat top = load(scores);
  for (int v = 1; v < vectors; ++v) top = max(top, load(scores + v * lanes));
  const float block_top = max(top);
  const float new_top = block_top > tile.top[query] ? block_top : tile.top[query];
  vfloat total = {};
  for (int v = 0; v < vectors; ++v) {
    const vfloat e = exp(load(scores + v * lanes) - new_top);
    store(scores + v * lanes, e);
    total += e;
  }
  const vfloat decay = exp(splat(tile.top[query] - new_top));
  tile.decay[query] = decay[0];
  tile.total[query] = tile.total[query] * tile.decay[query] + sum(total);
  tile.top[query] = new_top;
}

template <class T, int queries, int vectors>
HRMCORE_INLINE void mix_part(QueryTile& tile, int first, const T* values, std::int64_t channels,
                             std::int64_t channel, std::int64_t keys) {
  vfloat sums[queries][vectors];
#pragma GCC unroll 4
  for (int q = 0; q < queries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      sums[q][v] = load(tile.out[first + q] + channel + v * lanes) * tile.decay[first + q];
  }
  for (std::int64_t j = 0; j < keys; ++j) {
    vfloat value[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) value[v] = load_value(values + j * channels + channel + v * lanes);
#pragma GCC unroll 4
    for (int q = 0; q < queries; ++q) {
      const vfloat weight = splat(tile.weight[first + q][j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[q][v] = fma(weight, value[v], sums[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < queries; ++q) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(tile.out[first + q] + channel + v * lanes, sums[q][v]);
  }
}

// out = out * decay + weights * values, for all queries of the tile.
template <class T>
void mix(QueryTile& tile, int queries, const T* values, std::int64_t channels, std::int64_t keys) {
  constexpr int vectors = 32 / lanes < 4 ? 32 / lanes : 4;
  for (std::int64_t channel = 0; channel < channels; channel += vectors * lanes) {
    int q = 0;
    for (; q + 4 <= queries; q += 4) mix_part<T, 4, vectors>(tile, q, values, channels, channel, keys);
    for (; q < queries; ++q) mix_part<T, 1, vectors>(tile, q, values, channels, channel, keys);
  }
}

void mix_values(const CacheShape& shape, QueryTile& tile, int queries, const std::byte* values,
                std::int64_t keys) {
  const std::int64_t channels = shape.channels();
  if (shape.packing == Packing::f32) {
    mix(tile, queries, reinterpret_cast<const float*>(values), channels, keys);
  } else if (shape.packing == Packing::bf16) {
    mix(tile, queries, reinterpret_cast<const bf16*>(values), channels, keys);
  } else {
    const auto* scales = reinterpret_cast<const float*>(values + block_tokens * channels);
    for (int q = 0; q < queries; ++q) {
      for (std::int64_t j = 0; j < keys; ++j) tile.weight[q][j] *= scales[j];
    }
    mix(tile, queries, reinterpret_cast<const std::int8_t*>(values), channels, keys);
  }
}

void attend_tile(const Attend& args, std::int64_t first, int queries, QueryTile& tile) {
  const CacheShape& shape = args.shape;
  const std::int64_t dim = shape.head_dim, channels = shape.channels(), width = shape.heads * dim;
  const auto bytes = static_cast<std::size_t>(dim) * sizeof(float);
  for (int q = 0; q < queries; ++q) {
    __builtin_memset(tile.query[q], 0, sizeof(tile.query[q]));
    __builtin_memset(tile.out[q], 0, sizeof(tile.out[q]));
    __builtin_memcpy(tile.query[q], args.gqkv + (first + q) * args.stride + width + args.head * dim, bytes);
    if (shape.packing == Packing::int8) {
      for (std::int64_t g = 0; g < groups_of(dim); ++g)
        tile.quantised[q][g] = quantised(tile.query[q] + g * group_columns);
    }
    tile.top[q] = -__builtin_inff();
    tile.total[q] = 0;
  }
  const bool int8 = shape.packing == Packing::int8;
  const auto last = args.start + first + queries;  // the tile's last query sees at least this many keys
  const std::int64_t most = last > args.prefix ? last : args.prefix;
  for (std::int64_t block = 0; block * block_tokens < most; ++block) {
    const std::byte* keys =
        args.blocks[block] + args.slot * shape.slot_bytes() + args.head * shape.head_bytes();
    ChunkProduct scores{};
    scores.weights = keys;
    scores.groups = groups_of(dim);
    scores.x = int8 ? reinterpret_cast<const std::byte*>(tile.quantised)
                    : reinterpret_cast<const std::byte*>(tile.query);
    scores.x_row_bytes = int8 ? sizeof(tile.quantised[0]) : sizeof(tile.query[0]);
    scores.tokens = queries;
    scores.out = tile.weight[0];
    scores.out_stride = block_tokens;
    multiply_chunk(shape.packing, scores);
    for (int q = 0; q < queries; ++q) {
      const std::int64_t causal = args.start + first + q + 1;
      soften(tile, q, (causal > args.prefix ? causal : args.prefix) - block * block_tokens);
    }
    const std::int64_t left = most - block * block_tokens;
    mix_values(shape, tile, queries, keys + shape.key_bytes(), left < block_tokens ? left : block_tokens);
  }
  for (int q = 0; q < queries; ++q) {
    float* gate = tile.query[q];
    __builtin_memcpy(gate, args.gqkv + (first + q) * args.stride + args.head * dim, bytes);
    for (std::int64_t c = 0; c < channels; c += lanes) {
      store(tile.out[q] + c, load(tile.out[q] + c) / tile.total[q] * sigmoid(load(gate + c)));
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
    const std::int64_t index = place.position % block_tokens;
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      std::byte* keys = place.block + args.slot * shape.slot_bytes() + head * shape.head_bytes();
      float* q = args.gqkv + token * args.stride + width + head * dim;
      rotate(q, angles, dim, scale, row);
      __builtin_memcpy(q, row, static_cast<std::size_t>(dim) * sizeof(float));
      rotate(q + width, angles, dim, 1.0f, row);
      store_key(shape, keys, index, row);
      __builtin_memcpy(row, q + 2 * width, static_cast<std::size_t>(dim) * sizeof(float));
      store_value(shape, keys + shape.key_bytes(), index, row);
    }
  }
}

void attend(const Attend& args) noexcept {
  QueryTile tile;
  for (std::int64_t query = args.query_begin; query < args.query_end; query += query_tile) {
    const std::int64_t left = args.query_end - query;
    attend_tile(args, query, static_cast<int>(left < query_tile ? left : query_tile), tile);
  }
}

}  // namespace hrmcore::HRMCORE_ISA
