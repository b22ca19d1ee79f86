// What the forward and the backward of attention share: small GEMMs, the blocks of queries and
// tiles of keys that they are cut into, and xPos. For attention.cpp and attention_backward.cpp only.
//
// xPos decays channel c of a score by exp(log_decay_c * distance). The distance is cut at the edge of the
// tile that faces the queries and at the edge of the block that faces the keys: a key is scaled by what lies
// between it and the edges, a query by its own part, so no factor grows with the length. Within the tile that
// holds the queries the edges stand the wrong way round and factors reach exp(-log_decay * 94), 1.26 at scale
// base 512. Keys of a tile that stand before some query and after another are scored for both sides, and each
// element takes the side that its key is on.
#pragma once

#include <utility>

#include "core/simd.h"
#include "ops/attention.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

constexpr int max_width = 256;   // head_dim
constexpr int query_block = 32;  // queries of one task; the row length of every transposed buffer
constexpr int key_tile = 64;     // keys visited at a time
constexpr int block_rows = lanes == 16 ? 8 : 6;  // register blocking: block_rows x block_vectors accumulators
constexpr int block_vectors = 2;
constexpr float minus_infinity = -__builtin_inff();

// What row r, column c of a GEMM is multiplied by: rows[r * stride + c] * columns[c]; from column `period`
// on by the same again.
struct Factors {
  const float* rows;  // null: by nothing
  std::int64_t stride;
  const float* columns;
  std::int64_t period;
};

// C (rows x vectors * lanes) = A (rows x depth) B (depth x vectors * lanes), times its factors, or += where
// add is set. A is read through any two strides, so a transposed A costs nothing; the rows of B and C are
// contiguous.
struct Gemm {
  const float* a;
  std::int64_t a_row, a_column;
  const float* b;
  std::int64_t b_row;
  float* c;
  std::int64_t c_row;
  std::int64_t rows, vectors, depth;
  bool add;
  Factors factors;
};

// A cell is one accumulator. Spelled out one by one, not as loops, so that all of them stay in registers.
template <int vectors, int... cell>
HRMCORE_INLINE void multiply_cells(const Gemm& p, std::int64_t row, std::int64_t column,
                                   std::integer_sequence<int, cell...>) {
  vfloat total[] = {(static_cast<void>(cell), vfloat{})...};
  const std::int64_t a_row = p.a_row, a_column = p.a_column, b_row = p.b_row, c_row = p.c_row;
  const float *a = p.a + row * a_row, *b = p.b + column;
  for (std::int64_t step = p.depth; step > 0; --step) {
    ((total[cell] += splat(a[cell / vectors * a_row]) * load(b + cell % vectors * lanes)), ...);
    a += a_column;
    b += b_row;
  }
  if (p.factors.rows != nullptr) {
    const std::int64_t stride = p.factors.stride, period = p.factors.period;
    const std::int64_t same = column < period ? column : column - period;
    const float *rows = p.factors.rows + row * stride + same, *columns = p.factors.columns + same;
    ((total[cell] *=
      load(rows + cell / vectors * stride + cell % vectors * lanes) * load(columns + cell % vectors * lanes)),
     ...);
  }
  float* c = p.c + row * c_row + column;
  if (p.add) ((total[cell] += load(c + cell / vectors * c_row + cell % vectors * lanes)), ...);
  (store(c + cell / vectors * c_row + cell % vectors * lanes, total[cell]), ...);
}

template <int rows, int vectors>
void multiply_block(const Gemm& p, std::int64_t row, std::int64_t column) {
  multiply_cells<vectors>(p, row, column, std::make_integer_sequence<int, rows * vectors>());
}

using BlockGemm = void (*)(const Gemm&, std::int64_t row, std::int64_t column);

struct BlockTable {
  BlockGemm entry[block_vectors][block_rows];
};

template <int... row>
constexpr BlockTable make_table(std::integer_sequence<int, row...>) {
  return {{{multiply_block<row + 1, 1>...}, {multiply_block<row + 1, 2>...}}};
}

constexpr BlockTable block_table = make_table(std::make_integer_sequence<int, block_rows>());

inline void multiply(const Gemm& p) {
  const std::int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  for (std::int64_t vector = 0; vector < p.vectors; vector += block_vectors) {
    const std::int64_t vectors = p.vectors - vector < block_vectors ? p.vectors - vector : block_vectors;
    std::int64_t row = 0;
    for (std::int64_t block = blocks; block > 0; --block) {
      // Even blocks: a lone last row would be slow.
      const std::int64_t rows = (p.rows - row + block - 1) / block;
      block_table.entry[vectors - 1][rows - 1](p, row, vector * lanes);
      row += rows;
    }
  }
}

template <int... i>
HRMCORE_INLINE vfloat interleave_low(vfloat a, vfloat b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 2 + i % 2 * lanes)...);
}

template <int... i>
HRMCORE_INLINE vfloat interleave_high(vfloat a, vfloat b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (lanes / 2 + i / 2 + i % 2 * lanes)...);
}

// Interleaving the two halves of a square's rows log2(lanes) times transposes it.
HRMCORE_INLINE void transpose_square(vfloat (&rows)[lanes]) {
  constexpr std::make_integer_sequence<int, lanes> every{};
  for (int step = 1; step < lanes; step *= 2) {
    vfloat mixed[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
      mixed[2 * i] = interleave_low(rows[i], rows[i + lanes / 2], every);
      mixed[2 * i + 1] = interleave_high(rows[i], rows[i + lanes / 2], every);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = mixed[i];
  }
}

// Rows of float32 with a whole number of vectors each: the caller's memory, or a converted, padded copy.
struct Rows {
  const float* data;
  std::int64_t stride;
};

inline std::int64_t padded(std::int64_t width) { return (width + lanes - 1) / lanes * lanes; }

// columns (padded(width) x query_block) = scale * rows^T, zero in the columns of missing rows up to a whole
// vector.
inline void transpose(const Rows& rows, std::int64_t count, std::int64_t width, float scale, float* columns) {
  for (std::int64_t row = 0; row < count; row += lanes) {
    for (std::int64_t column = 0; column < width; column += lanes) {
      vfloat square[lanes];
      for (int i = 0; i < lanes; ++i) {
        square[i] = row + i < count ? load(rows.data + (row + i) * rows.stride + column) * scale : vfloat{};
      }
      transpose_square(square);
      for (int i = 0; i < lanes; ++i) store(columns + (column + i) * query_block + row, square[i]);
    }
  }
}

template <class T>
HRMCORE_INLINE vfloat load_columns(const T* p, std::int64_t column, std::int64_t width) {
  return column + lanes <= width ? load(p + column) : load_part(p + column, width - column);
}

template <class T>
HRMCORE_INLINE void store_columns(T* p, std::int64_t column, std::int64_t width, vfloat v) {
  if (column + lanes <= width) {
    store(p + column, v);
  } else {
    store_part(p + column, v, width - column);
  }
}

template <class T>
Rows stage(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t width, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    if (width % lanes == 0) return {rows, stride};
  }
  const std::int64_t length = padded(width);
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < width; column += lanes) {
      store(buffer + row * length + column, load_columns(rows + row * stride, column, width));
    }
  }
  return {buffer, length};
}

// One head of one sequence, and which keys each of its queries sees: from first_visible up to visible.
struct Sequence {
  std::int64_t queries, keys;           // lengths
  std::int64_t first_query, first_key;  // rows in the packed tensors
  std::int64_t head, prefix;
  std::int64_t window;  // 0: none

  template <class T>
  T* query_rows(const TensorView& tensor, std::int64_t query) const {
    return tensor.as<T>() + (first_query + query) * tensor.strides[0] + head * tensor.strides[1];
  }
  template <class T>
  T* key_rows(const TensorView& tensor, std::int64_t key) const {
    return tensor.as<T>() + (first_key + key) * tensor.strides[0] + head * tensor.strides[1];
  }
  std::int64_t position(std::int64_t query) const { return keys - queries + query; }
  std::int64_t visible(std::int64_t query) const {
    const std::int64_t causal = position(query) + 1;
    const std::int64_t most = causal > prefix ? causal : prefix;
    if (window == 0) return most;
    const std::int64_t border = (position(query) / window + 2) * window;
    return most < border ? most : border;
  }
  std::int64_t first_visible(std::int64_t query) const {
    return window == 0 || position(query) < window ? 0 : (position(query) / window - 1) * window;
  }
  // Where the block that starts with this query ends: after query_block of them, counted from the sequence's
  // first, or where the window moves on.
  std::int64_t block_end(std::int64_t query) const {
    std::int64_t end = (query / query_block + 1) * query_block;
    if (end > queries) end = queries;
    if (window == 0) return end;
    const std::int64_t border = query + window - position(query) % window;
    return end < border ? end : border;
  }
};

template <class Args>
HRMCORE_INLINE Sequence sequence_of(const Args& args, std::int64_t s, std::int64_t head) {
  const auto *query = args.offsets.template as<std::int32_t>(),
             *key = args.key_offsets.template as<std::int32_t>();
  return {query[s + 1] - query[s],
          key[s + 1] - key[s],
          query[s],
          key[s],
          head,
          args.prefix.template as<std::int32_t>()[s],
          args.window};
}

// Consecutive queries of one head of a sequence, at most query_block of them.
struct Block {
  std::int64_t first, rows;
  std::int64_t position;             // of the first row
  std::int64_t vectors;              // that hold the rows
  std::int64_t first_key, keys;      // what the last row sees, which sees most: from first_key up to keys
  std::int32_t limits[query_block];  // keys visible to each row
};

HRMCORE_INLINE Block block_of(const Sequence& sequence, std::int64_t first) {
  Block block;
  block.first = first;
  block.rows = sequence.block_end(first) - first;
  block.position = sequence.position(first);
  block.vectors = (block.rows + lanes - 1) / lanes;
  block.first_key = sequence.first_visible(first);
  block.keys = sequence.visible(first + block.rows - 1);
  for (std::int64_t row = 0; row < query_block; ++row) {
    block.limits[row] = static_cast<std::int32_t>(sequence.visible(first + row));
  }
  return block;
}

// Puts minus infinity where a query does not see a key of the tile. scores: (keys x query_block).
inline void apply_mask(const Block& block, std::int64_t first_key, std::int64_t keys, float* scores) {
  const std::int64_t seen_by_all = block.limits[0] - first_key;
  for (std::int64_t key = seen_by_all > 0 ? seen_by_all : 0; key < keys; ++key) {
    const vint index = static_cast<std::int32_t>(first_key + key) - vint{};
    for (std::int64_t v = 0; v < block.vectors; ++v) {
      float* score = scores + key * query_block + v * lanes;
      vint limit;
      __builtin_memcpy(&limit, block.limits + v * lanes, sizeof(limit));
      store(score, index < limit ? load(score) : splat(minus_infinity));
    }
  }
}

// How xPos decays each channel over a distance. From channel `period` on the factors repeat and are not
// stored again.
struct XposDecay {
  std::int64_t period;
  alignas(64) float log_decay[max_width];
  alignas(64) float powers[key_tile * max_width];  // over the distances within a tile

  void fill(const TensorView& source) {
    const std::int64_t half = source.shape[0], width = 2 * half;
    period = half % (block_vectors * lanes) == 0 ? half : padded(width);
    for (std::int64_t c = 0; c < period; ++c)
      log_decay[c] = c < width ? source.as<float>()[c % half * source.strides[0]] : 0.0f;
    for (std::int64_t distance = 0; distance < key_tile; ++distance)
      over(distance, powers + distance * period);
  }
  const float* power(std::int64_t distance) const { return powers + distance * period; }
  // What is too small to count beside anything else is zero, so that no product with it is denormal.
  void over(std::int64_t distance, float* factor) const {
    for (std::int64_t c = 0; c < period; c += lanes) {
      const vfloat exponent = load(log_decay + c) * static_cast<float>(distance);
      store(factor + c, exponent < -64.0f ? vfloat{} : exp(exponent));
    }
  }
};

// Rows of a tile.
struct Span {
  std::int64_t begin, end;
  std::int64_t count() const { return end - begin; }
  bool empty() const { return begin >= end; }
};

// The keys of a tile that some query of the block sees before itself, its own among them (0), and those that
// some query sees after itself (1). Without decay all are on side 0.
struct Sides {
  Span span[2];
  bool both() const { return !span[0].empty() && !span[1].empty(); }
};

HRMCORE_INLINE Sides sides_of(const XposDecay* decay, const Block& block, std::int64_t key,
                              std::int64_t keys) {
  if (decay == nullptr) return {{{0, keys}, {0, 0}}};
  const auto inside = [&](std::int64_t row) { return row < 0 ? 0 : row < keys ? row : keys; };
  const std::int64_t own = block.position - key;
  return {{{0, inside(own + block.rows)}, {inside(own + 1), inside(block.limits[0] - key)}}};
}

// Calls f(side, span) for each side that has keys.
template <class F>
HRMCORE_INLINE void for_each_side(const Sides& sides, const F& f) {
  for (int side = 0; side < 2; ++side) {
    if (!sides.span[side].empty()) f(side, sides.span[side]);
  }
}

// The sides that a block's keys can be on are 0 up to this one.
HRMCORE_INLINE int last_side(const XposDecay* decay, const Block& block) {
  return decay != nullptr && block.limits[0] > block.position + 1 ? 1 : 0;
}

// row i of the result = row i of `rows` times the decay over |start - i| times `factor`; start <= 0 or
// start >= count - 1. Columns are the outer loop: a column's factor, and where the factors repeat its power,
// serve from a register.
template <class T>
HRMCORE_INLINE Rows apply_decay(const T* rows, std::int64_t stride, std::int64_t count, std::int64_t width,
                                const XposDecay& decay, std::int64_t start, const float* factor,
                                float* buffer) {
  const std::int64_t length = padded(width), period = decay.period;
  const std::int64_t step = start > 0 ? -period : period;
  for (std::int64_t column = 0; column < period; column += lanes) {
    const vfloat all = load(factor + column);
    const float* power = decay.power(start > 0 ? start : -start) + column;
    if (period < length) {  // whole vectors
      for (std::int64_t row = 0; row < count; ++row) {
        const vfloat decayed = load(power + row * step) * all;
        const T* from = rows + row * stride + column;
        float* to = buffer + row * length + column;
        store(to, load(from) * decayed);
        store(to + period, load(from + period) * decayed);
      }
    } else {
      for (std::int64_t row = 0; row < count; ++row)
        store(buffer + row * length + column,
              load_columns(rows + row * stride, column, width) * load(power + row * step) * all);
    }
  }
  return {buffer, length};
}

// The edges of a tile and of a block on each side: the index of the row that stands there.
constexpr std::int64_t key_edge[2] = {key_tile - 1, 0}, query_edge[2] = {0, query_block - 1};

// The queries of a block for keys on one side of them; without decay for all of them.
template <class T>
HRMCORE_INLINE Rows stage_queries(const T* rows, std::int64_t stride, const Block& block, std::int64_t width,
                                  const XposDecay* decay, int side, float* buffer) {
  if (decay == nullptr) return stage(rows, stride, block.rows, width, buffer);
  return apply_decay(rows, stride, block.rows, width, *decay, query_edge[side], decay->power(0), buffer);
}

// The keys of a tile as the queries of a block see them from each side, from the first of the side's span on.
struct KeyTile {
  Rows side[2];
  alignas(64) float rows[2][key_tile * max_width];
  alignas(64) float factor[2][max_width];  // the decay from the edge of the tile to the edge of the block

  template <class T>
  void stage_side(const T* k, std::int64_t stride, const Block& block, std::int64_t key, const Span& span,
                  std::int64_t width, const XposDecay* decay, int which) {
    const T* first = k + span.begin * stride;
    if (decay == nullptr) {
      side[which] = stage(first, stride, span.count(), width, rows[which]);
      return;
    }
    const std::int64_t edge = key + key_edge[which], query = block.position + query_edge[which];
    decay->over(which == 0 ? query - edge : edge - query, factor[which]);
    side[which] = apply_decay(first, stride, span.count(), width, *decay, key_edge[which] - span.begin,
                              factor[which], rows[which]);
  }
  // What the decay of the keys of a side multiplies their gradients by.
  Factors factors(const XposDecay* decay, const Span& span, int which) const {
    if (decay == nullptr) return {};
    const std::int64_t period = decay->period;
    if (which == 0) return {decay->power(key_edge[0] - span.begin), -period, factor[0], period};
    return {decay->power(span.begin - key_edge[1]), period, factor[1], period};
  }
};

// Calls f(cell, after) for each vector of those rows of a (keys x query_block) tile; `after` marks keys after
// their query.
template <class F>
HRMCORE_INLINE void for_sides(const Block& block, std::int64_t first_key, const Span& span, const F& f) {
  alignas(64) std::int32_t position[query_block];
  for (int row = 0; row < query_block; ++row) position[row] = static_cast<std::int32_t>(block.position + row);
  for (std::int64_t key = span.begin; key < span.end; ++key) {
    const vint index = static_cast<std::int32_t>(first_key + key) - vint{};
    for (std::int64_t v = 0; v < block.vectors; ++v) {
      vint own;
      __builtin_memcpy(&own, position + v * lanes, sizeof(own));
      f(key * query_block + v * lanes, index > own);
    }
  }
}

// `before` keeps the scores of the keys that are not after their query and takes the others from `after`.
inline void take_sides(const Block& block, std::int64_t first_key, const Span& span, float* before,
                       const float* after) {
  for_sides(block, first_key, span, [&](std::int64_t cell, vint is_after) __attribute__((always_inline)) {
    store(before + cell, is_after ? load(after + cell) : load(before + cell));
  });
}

// Leaves in `before` what belongs to keys that are not after their query, the rest in `after`, zeros
// elsewhere.
inline void part_sides(const Block& block, std::int64_t first_key, const Span& span, float* before,
                       float* after) {
  for_sides(block, first_key, span, [&](std::int64_t cell, vint is_after) __attribute__((always_inline)) {
    const vfloat all = load(before + cell);
    store(before + cell, is_after ? vfloat{} : all);
    store(after + cell, is_after ? all : vfloat{});
  });
}

// Scores of a tile (keys x query_block) into scores[0], masked. `k`: its first key's row.
template <class T>
HRMCORE_INLINE void score_tile(const T* k, std::int64_t stride, const Block& block, const XposDecay* decay,
                               std::int64_t key, std::int64_t keys, const Sides& sides, std::int64_t width,
                               const float (*q_columns)[max_width * query_block], KeyTile& tile,
                               float (*scores)[key_tile * query_block]) {
  for_each_side(sides, [&](int side, const Span& span) {
    tile.stage_side(k, stride, block, key, span, width, decay, side);
    const Rows& rows = tile.side[side];
    float* to = scores[sides.both() ? side : 0] + span.begin * query_block;
    multiply({rows.data,
              rows.stride,
              1,
              q_columns[side],
              query_block,
              to,
              query_block,
              span.count(),
              block.vectors,
              width,
              false,
              {}});
  });
  if (sides.both()) take_sides(block, key, sides.span[1], scores[0], scores[1]);
  apply_mask(block, key, keys, scores[0]);
}

inline const XposDecay* fill_decay(const TensorView& log_decay, XposDecay& decay) {
  if (log_decay.data == nullptr) return nullptr;
  decay.fill(log_decay);
  return &decay;
}

// Tasks of one block of work: one, or all of them where the whole call is too small to wake a second thread
// for.
template <class Args>
std::int64_t tasks_of_block(const Args& args, std::int64_t tasks) {
  constexpr std::int64_t small = 1 << 20;  // FLOPs
  std::int64_t pairs = 0;
  for (std::int64_t s = 0; s < args.prefix.shape[0]; ++s) {
    const Sequence sequence = sequence_of(args, s, 0);
    pairs += sequence.queries * sequence.keys;
  }
  return 4 * pairs * args.q.shape[1] * args.q.shape[2] < small ? tasks : 1;
}

}  // namespace
}  // namespace hrmcore::HRMCORE_ISA
