#include "ops/attention.h"

#include <utility>

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_heads(const char* op, const char* argument, const TensorView& tensor, const TensorView& q) {
  Check(op, argument, tensor).cpu().rank(3).dtype({q.dtype}).last_contiguous();
  Check(op, argument, tensor).size(1, q.shape[1], "H").size(2, q.shape[2], "d");
}

void check_query_rows(const char* op, const char* argument, const TensorView& tensor, const TensorView& q) {
  check_heads(op, argument, tensor, q);
  Check(op, argument, tensor).same_shape(q, "q");
}

std::string at(const char* argument, std::int64_t s) {
  return std::string(argument) + "[" + std::to_string(s) + "]";
}

void check_offsets(const char* op, const char* argument, const TensorView& offsets, std::int64_t rows) {
  Check(op, argument, offsets).cpu().rank(1).dtype({DType::i32}).contiguous();
  const std::int64_t count = offsets.shape[0];
  if (count < 1) reject(op, argument, "of at least one element (S + 1)", "an empty tensor");
  const auto* offset = offsets.as<std::int32_t>();
  if (offset[0] != 0) reject(op, argument, "0 in its first element", std::to_string(offset[0]));
  for (std::int64_t s = 1; s < count; ++s) {
    if (offset[s] < offset[s - 1]) {
      reject(op, argument, "non-decreasing",
             at(argument, s) + " = " + std::to_string(offset[s]) + " after " + std::to_string(offset[s - 1]));
    }
  }
  if (offset[count - 1] != rows) {
    reject(op, argument, std::to_string(rows) + " (the number of rows) in its last element",
           std::to_string(offset[count - 1]));
  }
}

void check_sequences(const char* op, const TensorView& offsets, const TensorView& key_offsets,
                     const TensorView& prefix) {
  Check(op, "key_offsets", key_offsets).same_shape(offsets, "offsets");
  Check(op, "prefix", prefix)
      .cpu()
      .rank(1)
      .dtype({DType::i32})
      .contiguous()
      .size(0, offsets.shape[0] - 1, "S");
  const auto *query = offsets.as<std::int32_t>(), *key = key_offsets.as<std::int32_t>();
  const auto* visible = prefix.as<std::int32_t>();
  for (std::int64_t s = 0; s + 1 < offsets.shape[0]; ++s) {
    const std::int32_t queries = query[s + 1] - query[s], keys = key[s + 1] - key[s];
    if (keys < queries) {
      reject(op, "key_offsets", "such that each sequence has at least as many keys as queries",
             std::to_string(keys) + " keys for " + std::to_string(queries) + " queries in sequence " +
                 std::to_string(s));
    }
    if (visible[s] < 0 || visible[s] > keys) {
      reject(op, "prefix", "between 0 and the sequence's number of keys, " + std::to_string(keys),
             at("prefix", s) + " = " + std::to_string(visible[s]));
    }
  }
}

// The fields that forward and backward share, under the same names.
template <class Args>
void check_inputs(const char* op, const Args& args) {
  Check(op, "q", args.q).cpu().rank(3).dtype({DType::f32, DType::bf16}).last_contiguous();
  const std::int64_t head_dim = args.q.shape[2];
  if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
    reject(op, "q", "of a head_dim (last axis) that is a multiple of 8 from 8 to 256",
           std::to_string(head_dim));
  }
  check_heads(op, "k", args.k, args.q);
  check_heads(op, "v", args.v, args.q);
  Check(op, "v", args.v).same_shape(args.k, "k");
  check_query_rows(op, "gate", args.gate, args.q);
  check_offsets(op, "offsets", args.offsets, args.q.shape[0]);
  check_offsets(op, "key_offsets", args.key_offsets, args.k.shape[0]);
  check_sequences(op, args.offsets, args.key_offsets, args.prefix);
  check_query_rows(op, "out", args.out, args.q);
  Check(op, "lse", args.lse).cpu().rank(2).dtype({DType::f32}).last_contiguous();
  Check(op, "lse", args.lse).size(0, args.q.shape[0], "T").size(1, args.q.shape[1], "H");
}

}  // namespace

void check(const AttentionForward& args) { check_inputs("attention_forward", args); }

void check(const AttentionBackward& args) {
  const char* op = "attention_backward";
  check_inputs(op, args);
  check_query_rows(op, "grad_out", args.grad_out, args.q);
  check_query_rows(op, "grad_q", args.grad_q, args.q);
  check_query_rows(op, "grad_gate", args.grad_gate, args.q);
  Check(op, "grad_k", args.grad_k).cpu().dtype({DType::f32}).same_shape(args.k, "k").last_contiguous();
  Check(op, "grad_v", args.grad_v).cpu().dtype({DType::f32}).same_shape(args.k, "k").last_contiguous();
}
#endif

namespace HRMCORE_ISA {
namespace {

constexpr int max_width = 256;   // head_dim
constexpr int query_block = 32;  // queries of one task; the row length of every transposed buffer
constexpr int key_tile = 64;     // keys visited at a time
constexpr int block_rows = lanes == 16 ? 8 : 6;  // register blocking: block_rows x block_vectors accumulators
constexpr int block_vectors = 2;
constexpr int blocks_together = 8;  // of one head, before the next: keys are reused, neighbours stay near
constexpr float minus_infinity = -__builtin_inff();

// C (rows x vectors * lanes) = A (rows x depth) B (depth x vectors * lanes), or += where add is set. A is
// read through any two strides, so a transposed A costs nothing; the rows of B and C are contiguous.
struct Product {
  const float* a;
  std::int64_t a_row, a_column;
  const float* b;
  std::int64_t b_row;
  float* c;
  std::int64_t c_row;
  std::int64_t rows, vectors, depth;
  bool add;
};

// A cell is one accumulator. Spelled out one by one, not as loops, so that all of them stay in registers.
template <int vectors, int... cell>
HRMCORE_INLINE void multiply_cells(const Product& p, const float* a, const float* b, float* c,
                                   std::integer_sequence<int, cell...>) {
  vfloat total[] = {(static_cast<void>(cell), vfloat{})...};
  const std::int64_t a_row = p.a_row, a_column = p.a_column, b_row = p.b_row, c_row = p.c_row;
  for (std::int64_t step = p.depth; step > 0; --step) {
    ((total[cell] += splat(a[cell / vectors * a_row]) * load(b + cell % vectors * lanes)), ...);
    a += a_column;
    b += b_row;
  }
  if (p.add) ((total[cell] += load(c + cell / vectors * c_row + cell % vectors * lanes)), ...);
  (store(c + cell / vectors * c_row + cell % vectors * lanes, total[cell]), ...);
}

template <int rows, int vectors>
void multiply_block(const Product& p, const float* a, const float* b, float* c) {
  multiply_cells<vectors>(p, a, b, c, std::make_integer_sequence<int, rows * vectors>());
}

using BlockProduct = void (*)(const Product&, const float*, const float*, float*);

struct BlockTable {
  BlockProduct entry[block_vectors][block_rows];
};

template <int... row>
constexpr BlockTable make_table(std::integer_sequence<int, row...>) {
  return {{{multiply_block<row + 1, 1>...}, {multiply_block<row + 1, 2>...}}};
}

constexpr BlockTable block_table = make_table(std::make_integer_sequence<int, block_rows>());

void multiply(const Product& p) {
  const std::int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  for (std::int64_t vector = 0; vector < p.vectors; vector += block_vectors) {
    const std::int64_t vectors = p.vectors - vector < block_vectors ? p.vectors - vector : block_vectors;
    std::int64_t row = 0;
    for (std::int64_t block = blocks; block > 0; --block) {
      const std::int64_t rows =
          (p.rows - row + block - 1) / block;  // even blocks: a lone last row would be slow
      block_table.entry[vectors - 1][rows - 1](p, p.a + row * p.a_row, p.b + vector * lanes,
                                               p.c + row * p.c_row + vector * lanes);
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

// Rows of float32 with a whole number of vectors each: the caller's memory, or a converted, padded copy of
// it.
struct Rows {
  const float* data;
  std::int64_t stride;
};

std::int64_t padded(std::int64_t width) { return (width + lanes - 1) / lanes * lanes; }

// columns (padded(width) x query_block) = scale * rows^T, zero in the columns of missing rows up to a whole
// vector.
void transpose(const Rows& rows, std::int64_t count, std::int64_t width, float scale, float* columns) {
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

// One head of one sequence, and which keys each of its queries sees.
struct Sequence {
  std::int64_t queries, keys;           // lengths
  std::int64_t first_query, first_key;  // rows in the packed tensors
  std::int64_t head, prefix;

  template <class T>
  T* query_rows(const TensorView& tensor, std::int64_t query) const {
    return tensor.as<T>() + (first_query + query) * tensor.strides[0] + head * tensor.strides[1];
  }
  template <class T>
  T* key_rows(const TensorView& tensor, std::int64_t key) const {
    return tensor.as<T>() + (first_key + key) * tensor.strides[0] + head * tensor.strides[1];
  }
  std::int64_t visible(std::int64_t query) const {
    const std::int64_t causal = keys - queries + query + 1;
    return causal > prefix ? causal : prefix;
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
          args.prefix.template as<std::int32_t>()[s]};
}

// Consecutive queries of one head of a sequence, at most query_block of them.
struct Block {
  std::int64_t first, rows;
  std::int64_t vectors;              // that hold the rows
  std::int64_t keys;                 // visible to the last row, which sees most
  std::int32_t limits[query_block];  // keys visible to each row
};

HRMCORE_INLINE Block block_of(const Sequence& sequence, std::int64_t first) {
  Block block;
  block.first = first;
  block.rows = sequence.queries - first < query_block ? sequence.queries - first : query_block;
  block.vectors = (block.rows + lanes - 1) / lanes;
  block.keys = sequence.visible(first + block.rows - 1);
  for (std::int64_t row = 0; row < query_block; ++row) {
    block.limits[row] = static_cast<std::int32_t>(sequence.visible(first + row));
  }
  return block;
}

// Puts minus infinity where a query does not see a key of the tile. scores: (keys x query_block).
void hide(const Block& block, std::int64_t first_key, std::int64_t keys, float* scores) {
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

// The running maximum and sum of the online softmax, one lane a query.
struct Softmax {
  alignas(64) float top[query_block];
  alignas(64) float total[query_block];
  alignas(64) float decay[query_block];  // what the newest tile multiplies the sums before it by
};

// scores (keys x query_block) become exp(score - top); returns whether an earlier sum must be decayed.
bool update_softmax(std::int64_t vectors, std::int64_t keys, float* scores, Softmax& softmax) {
  bool decays = false;
  for (std::int64_t v = 0; v < vectors; ++v) {
    float* column = scores + v * lanes;
    const vfloat before = load(softmax.top + v * lanes);
    vfloat top = before, other = before;  // two chains of maxima hide half of the latency
    for (std::int64_t key = 0; key + 1 < keys; key += 2) {
      top = max(top, load(column + key * query_block));
      other = max(other, load(column + (key + 1) * query_block));
    }
    top = max(max(top, other), load(column + (keys - 1) * query_block));
    const vfloat decay = exp(before - top);
    vfloat total = load(softmax.total + v * lanes) * decay;
    for (std::int64_t key = 0; key < keys; ++key) {
      const vfloat weight = exp(load(column + key * query_block) - top);
      store(column + key * query_block, weight);
      total += weight;
    }
    store(softmax.top + v * lanes, top);
    store(softmax.total + v * lanes, total);
    store(softmax.decay + v * lanes, decay);
    decays = decays || sum(decay != 1.0f ? splat(1.0f) : vfloat{}) > 0;
  }
  return decays;
}

void decay_rows(const Softmax& softmax, std::int64_t count, std::int64_t length, float* rows) {
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < length; column += lanes) {
      float* p = rows + row * length + column;
      store(p, load(p) * softmax.decay[row]);
    }
  }
}

template <class T>
void write_output(const AttentionForward& args, const Sequence& sequence, const Block& block,
                  const Softmax& softmax, const float* sums) {
  const std::int64_t width = args.q.shape[2], length = padded(width);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const std::int64_t query = block.first + row;
    const T* gate = sequence.query_rows<T>(args.gate, query);
    T* out = sequence.query_rows<T>(args.out, query);
    const float inverse = 1.0f / softmax.total[row];
    for (std::int64_t column = 0; column < width; column += lanes) {
      const vfloat open = sigmoid(load_columns(gate, column, width));
      store_columns(out, column, width, load(sums + row * length + column) * inverse * open);
    }
    *sequence.query_rows<float>(args.lse, query) = softmax.top[row] + __builtin_logf(softmax.total[row]);
  }
}

template <class T>
void forward_block(const AttentionForward& args, const Sequence& sequence, std::int64_t first) {
  alignas(64) float q_columns[max_width * query_block];
  alignas(64) float sums[query_block * max_width];
  alignas(64) float tile[key_tile * max_width];
  alignas(64) float scores[key_tile * query_block];
  Softmax softmax;
  for (int i = 0; i < query_block; ++i) {
    softmax.top[i] = minus_infinity;
    softmax.total[i] = 0;
  }
  const Block block = block_of(sequence, first);
  const std::int64_t width = args.q.shape[2], length = padded(width);
  const Rows q = stage(sequence.query_rows<T>(args.q, first), args.q.strides[0], block.rows, width, tile);
  transpose(q, block.rows, width, 1.0f / __builtin_sqrtf(static_cast<float>(width)), q_columns);
  for (std::int64_t key = 0; key < block.keys; key += key_tile) {
    const std::int64_t keys = block.keys - key < key_tile ? block.keys - key : key_tile;
    const Rows k = stage(sequence.key_rows<T>(args.k, key), args.k.strides[0], keys, width, tile);
    multiply({k.data, k.stride, 1, q_columns, query_block, scores, query_block, keys, block.vectors, width,
              false});
    hide(block, key, keys, scores);
    if (update_softmax(block.vectors, keys, scores, softmax) && key > 0)
      decay_rows(softmax, block.rows, length, sums);
    const Rows v = stage(sequence.key_rows<T>(args.v, key), args.v.strides[0], keys, width, tile);
    multiply(
        {scores, 1, query_block, v.data, v.stride, sums, length, block.rows, length / lanes, keys, key > 0});
  }
  write_output<T>(args, sequence, block, softmax, sums);
}

// The sequence that holds a row of the packed queries.
std::int64_t find_sequence(const TensorView& offsets, std::int64_t row) {
  const auto* offset = offsets.as<std::int32_t>();
  std::int64_t low = 0, high = offsets.shape[0] - 1;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (offset[middle] <= row ? low : high) = middle;
  }
  return low;
}

// A task is one head and the blocks that start within query_block packed rows: even work, whatever the
// sequences' lengths.
template <class T>
void forward_task(const AttentionForward& args, std::int64_t begin, std::int64_t head) {
  const std::int64_t end = begin + query_block, count = args.prefix.shape[0];
  for (std::int64_t s = find_sequence(args.offsets, begin); s < count; ++s) {
    const Sequence sequence = sequence_of(args, s, head);
    if (sequence.first_query >= end) break;
    const std::int64_t behind = begin - sequence.first_query;
    std::int64_t first = behind > 0 ? (behind + query_block - 1) / query_block * query_block : 0;
    for (; first < sequence.queries && sequence.first_query + first < end; first += query_block) {
      forward_block<T>(args, sequence, first);
    }
  }
}

// What one block of queries brings to its backward. The rows are padded to a whole number of vectors.
struct BackwardBlock {
  alignas(64) float q[query_block * max_width];
  alignas(64) float q_columns[max_width * query_block];
  alignas(64) float grad_o[query_block * max_width];  // of the ungated output
  alignas(64) float grad_o_columns[max_width * query_block];
  alignas(64) float grad_q[query_block * max_width];
  alignas(64) float lse[query_block];
  alignas(64) float delta[query_block];
};

// Ungates grad_out into grad_o and delta, and writes grad_gate.
template <class T>
void ungate(const AttentionBackward& args, const Sequence& sequence, const Block& block,
            BackwardBlock& buffer) {
  const std::int64_t width = args.q.shape[2], length = padded(width);
  for (std::int64_t row = 0; row < query_block; ++row) buffer.lse[row] = buffer.delta[row] = 0;
  for (std::int64_t row = 0; row < block.rows; ++row) {
    const std::int64_t query = block.first + row;
    const T* grad_out = sequence.query_rows<T>(args.grad_out, query);
    const T* out = sequence.query_rows<T>(args.out, query);
    const T* gate = sequence.query_rows<T>(args.gate, query);
    T* grad_gate = sequence.query_rows<T>(args.grad_gate, query);
    vfloat delta = {};
    for (std::int64_t column = 0; column < width; column += lanes) {
      const vfloat grad = load_columns(grad_out, column, width);
      const vfloat open = sigmoid(load_columns(gate, column, width));
      const vfloat product = grad * load_columns(out, column, width);
      delta += product;
      store_columns(grad_gate, column, width, product * (1.0f - open));
      store(buffer.grad_o + row * length + column, grad * open);
    }
    buffer.delta[row] = sum(delta);
    buffer.lse[row] = *sequence.query_rows<float>(args.lse, query);
  }
}

// scores become P, grads (dO v^T) become dS / sqrt(d); both (keys x query_block).
void softmax_backward(std::int64_t vectors, std::int64_t keys, float scale, const BackwardBlock& buffer,
                      float* scores, float* grads) {
  for (std::int64_t v = 0; v < vectors; ++v) {
    const vfloat lse = load(buffer.lse + v * lanes), delta = load(buffer.delta + v * lanes);
    for (std::int64_t key = 0; key < keys; ++key) {
      const std::int64_t at = key * query_block + v * lanes;
      const vfloat weight = exp(load(scores + at) - lse);
      store(scores + at, weight);
      store(grads + at, weight * (load(grads + at) - delta) * scale);
    }
  }
}

// sums (keys x width, in the caller's memory) += weights (keys x queries) rows (queries x width).
void add_product(const float* weights, const Rows& rows, std::int64_t keys, std::int64_t queries,
                 std::int64_t width, float* sums, std::int64_t sums_stride, float* scratch) {
  const std::int64_t length = padded(width);
  Product product{weights, query_block,    1,       rows.data, rows.stride, sums, sums_stride,
                  keys,    length / lanes, queries, true};
  if (length == width) {
    multiply(product);
    return;
  }
  product.c = scratch;
  product.c_row = length;
  product.add = false;
  multiply(product);
  for (std::int64_t key = 0; key < keys; ++key) {
    float* row = sums + key * sums_stride;
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(row, column, width,
                    load_columns(row, column, width) + load(scratch + key * length + column));
    }
  }
}

template <class T>
void backward_block(const AttentionBackward& args, const Sequence& sequence, std::int64_t first) {
  alignas(64) float tile[key_tile * max_width];
  alignas(64) float scores[key_tile * query_block];
  alignas(64) float grads[key_tile * query_block];
  BackwardBlock buffer;
  const Block block = block_of(sequence, first);
  const std::int64_t width = args.q.shape[2], length = padded(width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  const Rows q = stage(sequence.query_rows<T>(args.q, first), args.q.strides[0], block.rows, width, buffer.q);
  ungate<T>(args, sequence, block, buffer);
  const Rows grad_o{buffer.grad_o, length};
  transpose(q, block.rows, width, scale, buffer.q_columns);
  transpose(grad_o, block.rows, width, 1.0f, buffer.grad_o_columns);
  for (std::int64_t key = 0; key < block.keys; key += key_tile) {
    const std::int64_t keys = block.keys - key < key_tile ? block.keys - key : key_tile;
    const Rows v = stage(sequence.key_rows<T>(args.v, key), args.v.strides[0], keys, width, tile);
    multiply({v.data, v.stride, 1, buffer.grad_o_columns, query_block, grads, query_block, keys,
              block.vectors, width, false});
    const Rows k = stage(sequence.key_rows<T>(args.k, key), args.k.strides[0], keys, width, tile);
    multiply({k.data, k.stride, 1, buffer.q_columns, query_block, scores, query_block, keys, block.vectors,
              width, false});
    hide(block, key, keys, scores);
    softmax_backward(block.vectors, keys, scale, buffer, scores, grads);
    multiply({grads, 1, query_block, k.data, k.stride, buffer.grad_q, length, block.rows, length / lanes,
              keys, key > 0});
    add_product(grads, q, keys, block.rows, width, sequence.key_rows<float>(args.grad_k, key),
                args.grad_k.strides[0], tile);
    add_product(scores, grad_o, keys, block.rows, width, sequence.key_rows<float>(args.grad_v, key),
                args.grad_v.strides[0], tile);
  }
  for (std::int64_t row = 0; row < block.rows; ++row) {
    T* grad_q = sequence.query_rows<T>(args.grad_q, first + row);
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(grad_q, column, width, load(buffer.grad_q + row * length + column));
    }
  }
}

void clear_rows(float* rows, std::int64_t stride, std::int64_t count, std::int64_t width) {
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(rows + row * stride, column, width, vfloat{});
    }
  }
}

template <class T>
void backward_task(const AttentionBackward& args, const Sequence& sequence) {
  const std::int64_t width = args.q.shape[2];
  clear_rows(sequence.key_rows<float>(args.grad_k, 0), args.grad_k.strides[0], sequence.keys, width);
  clear_rows(sequence.key_rows<float>(args.grad_v, 0), args.grad_v.strides[0], sequence.keys, width);
  for (std::int64_t first = 0; first < sequence.queries; first += query_block) {
    backward_block<T>(args, sequence, first);
  }
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

void attention_forward(const AttentionForward& args) noexcept {
  const std::int64_t blocks = (args.q.shape[0] + query_block - 1) / query_block, heads = args.q.shape[1];
  const std::int64_t groups = (blocks + blocks_together - 1) / blocks_together;
  with_element(args.q.dtype, [&](auto* element) {
    const std::int64_t tasks = groups * heads * blocks_together;
    parallel_for(tasks, tasks_of_block(args, tasks), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t group = task / blocks_together / heads, head = task / blocks_together % heads;
        const std::int64_t block = group * blocks_together + task % blocks_together;
        if (block < blocks)
          forward_task<std::remove_pointer_t<decltype(element)>>(args, block * query_block, head);
      }
    });
  });
}

void attention_backward(const AttentionBackward& args) noexcept {
  const std::int64_t heads = args.q.shape[1];
  with_element(args.q.dtype, [&](auto* element) {
    const std::int64_t tasks = args.prefix.shape[0] * heads;
    parallel_for(tasks, tasks_of_block(args, tasks), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        backward_task<std::remove_pointer_t<decltype(element)>>(
            args, sequence_of(args, task / heads, task % heads));
      }
    });
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
