#include <limits>

#include "ops/attention_tiles.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_heads(const char* op, const char* argument, const TensorView& tensor, const TensorView& q) {
  Check(op, argument, tensor).cpu_or_cuda().rank(3).dtype({q.dtype}).last_contiguous();
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
  Check(op, argument, offsets).cpu_or_cuda().rank(1).dtype({DType::i32}).contiguous();
  const std::int64_t count = offsets.shape[0];
  if (count < 1) reject(op, argument, "of at least one element (S + 1)", "an empty tensor");
  if (offsets.device != Device::cpu) return;  // the kernel clamps what it reads
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
      .cpu_or_cuda()
      .rank(1)
      .dtype({DType::i32})
      .contiguous()
      .size(0, offsets.shape[0] - 1, "S");
  if (offsets.device != Device::cpu) return;
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

// Faster decay than the bound would overflow within a tile.
void check_log_decay(const char* op, const TensorView& log_decay, std::int64_t head_dim) {
  Check(op, "log_decay", log_decay).cpu_or_cuda().rank(1).dtype({DType::f32}).size(0, head_dim / 2, "d / 2");
  if (log_decay.device != Device::cpu) return;
  for (std::int64_t c = 0; c < head_dim / 2; ++c) {
    const float rate = log_decay.as<float>()[c * log_decay.strides[0]];
    if (!(rate >= -0.5f && rate <= 0)) reject(op, "log_decay", "in [-0.5, 0]", std::to_string(rate));
  }
}

void check_window(const char* op, std::int64_t window) {
  if (window < 0 || window % 64 != 0)
    reject(op, "window", "a multiple of 64, or 0 for none", std::to_string(window));
}

// The fields that forward and backward share, under the same names.
template <class Args>
void check_inputs(const char* op, const Args& args) {
  Check(op, "q", args.q).cpu_or_cuda().rank(3).dtype({DType::f32, DType::bf16}).last_contiguous();
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
  Check(op, "lse", args.lse).cpu_or_cuda().rank(2).dtype({DType::f32}).last_contiguous();
  Check(op, "lse", args.lse).size(0, args.q.shape[0], "T").size(1, args.q.shape[1], "H");
  if (args.log_decay.data != nullptr) check_log_decay(op, args.log_decay, head_dim);
  check_window(op, args.window);
}

void check_table(const char* op, const TensorView& tiles, std::int64_t lines) {
  if (!tiles.given()) return;
  Check(op, "tiles", tiles).cpu_or_cuda().rank(2).dtype({DType::i32}).contiguous().size(1, line_ints, "8");
  if (tiles.shape[0] < lines) {
    reject(op, "tiles", "of at least " + std::to_string(lines) + " lines", std::to_string(tiles.shape[0]));
  }
}

// A gradient of keys or values. Where the table is given the sums are in registers, and come rounded.
void check_summed(const char* op, const char* argument, const TensorView& grad,
                  const AttentionBackward& args) {
  const Check check(op, argument, grad);
  check.cpu_or_cuda().same_shape(args.k, "k").last_contiguous();
  if (!args.tiles.given() || grad.dtype != args.q.dtype) check.dtype({DType::f32});
}

template <class Args>
std::int64_t lines_over_queries(const Args& args) {
  return lines_of_table(args.q.shape[0], args.prefix.shape[0]);
}

}  // namespace

void check(const AttentionForward& args) {
  check_inputs("attention_forward", args);
  check_table("attention_forward", args.tiles, lines_over_queries(args));
}

namespace {

void check_rotation(const char* op, const AttentionBackward& args) {
  if (!args.table.given() && !args.positions.given()) return;
  Check(op, "table", args.table).cpu_or_cuda().rank(2).dtype({DType::f32}).last_contiguous();
  Check(op, "table", args.table).size(1, args.q.shape[2], "d");
  Check(op, "positions", args.positions)
      .cpu_or_cuda()
      .rank(1)
      .dtype({DType::i32})
      .size(0, args.q.shape[0], "T");
  Check(op, "k", args.k).size(0, args.q.shape[0], "T, with a rotation");
  if (!args.tiles.given() || args.grad_k.dtype != DType::bf16) {
    reject(op, "table", "None but in bfloat16 on CUDA, with tiles and grad_k in bfloat16", "a table");
  }
}

}  // namespace

void check(const AttentionBackward& args) {
  const char* op = "attention_backward";
  check_inputs(op, args);
  check_query_rows(op, "grad_out", args.grad_out, args.q);
  check_query_rows(op, "grad_q", args.grad_q, args.q);
  check_query_rows(op, "grad_gate", args.grad_gate, args.q);
  check_summed(op, "grad_k", args.grad_k, args);
  check_summed(op, "grad_v", args.grad_v, args);
  check_table(op, args.tiles,
              lines_over_queries(args) + lines_of_table(args.k.shape[0], args.prefix.shape[0]));
  if (args.ungated.given()) check_query_rows(op, "ungated", args.ungated, args.q);
  check_rotation(op, args);
  if (!args.row_terms.given()) return;
  Check(op, "row_terms", args.row_terms).cpu_or_cuda().rank(3).dtype({DType::f32}).contiguous();
  Check(op, "row_terms", args.row_terms).size(0, 2, "2").size(1, args.q.shape[1], "H");
  Check(op, "row_terms", args.row_terms).size(2, args.q.shape[0], "T");
}

void check(const AttentionTable& args) {
  const char* op = "attention_table";
  for (const std::int64_t rows : {args.query_rows, args.key_rows}) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    if (rows < 0 || rows > most) reject(op, "rows", "from 0 to 2^31 - 1", std::to_string(rows));
  }
  check_offsets(op, "offsets", args.offsets, args.query_rows);
  check_offsets(op, "key_offsets", args.key_offsets, args.key_rows);
  check_sequences(op, args.offsets, args.key_offsets, args.prefix);
  check_window(op, args.window);
  const std::int64_t sequences = args.prefix.shape[0];
  Check(op, "tiles", args.tiles).cpu_or_cuda();
  check_table(op, args.tiles,
              lines_of_table(args.query_rows, sequences) + lines_of_table(args.key_rows, sequences));
}
#endif

namespace HRMCORE_ISA {
namespace {

constexpr int blocks_together = 8;  // of one head, before the next: keys are reused, neighbours stay near

// The running maximum and sum of the online softmax, one lane a query.
struct Softmax {
  alignas(64) float row_max[query_block];
  alignas(64) float row_sum[query_block];
  alignas(64) float rescale[query_block];  // what the newest tile multiplies the sums before it by
};

// scores (keys x query_block) become exp(score - row_max); returns whether an earlier sum must be rescaled.
bool update_softmax(std::int64_t vectors, std::int64_t keys, float* scores, Softmax& softmax) {
  bool rescales = false;
  for (std::int64_t v = 0; v < vectors; ++v) {
    float* column = scores + v * lanes;
    const vfloat before = load(softmax.row_max + v * lanes);
    vfloat top = before, other = before;  // two chains of maxima hide half of the latency
    for (std::int64_t key = 0; key + 1 < keys; key += 2) {
      top = max(top, load(column + key * query_block));
      other = max(other, load(column + (key + 1) * query_block));
    }
    top = max(max(top, other), load(column + (keys - 1) * query_block));
    const vfloat rescale = exp(before - top);
    vfloat total = load(softmax.row_sum + v * lanes) * rescale;
    for (std::int64_t key = 0; key < keys; ++key) {
      const vfloat weight = exp(load(column + key * query_block) - top);
      store(column + key * query_block, weight);
      total += weight;
    }
    store(softmax.row_max + v * lanes, top);
    store(softmax.row_sum + v * lanes, total);
    store(softmax.rescale + v * lanes, rescale);
    rescales = rescales || sum(rescale != 1.0f ? splat(1.0f) : vfloat{}) > 0;
  }
  return rescales;
}

void rescale_rows(const Softmax& softmax, std::int64_t count, std::int64_t length, float* rows) {
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < length; column += lanes) {
      float* p = rows + row * length + column;
      store(p, load(p) * softmax.rescale[row]);
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
    const float inverse = 1.0f / softmax.row_sum[row];
    for (std::int64_t column = 0; column < width; column += lanes) {
      const vfloat open = sigmoid(load_columns(gate, column, width));
      store_columns(out, column, width, load(sums + row * length + column) * inverse * open);
    }
    *sequence.query_rows<float>(args.lse, query) =
        softmax.row_max[row] + __builtin_logf(softmax.row_sum[row]);
  }
}

template <class T>
void forward_block(const AttentionForward& args, const Sequence& sequence, const XposDecay* decay,
                   std::int64_t first) {
  alignas(64) float q_columns[2][max_width * query_block];  // for the keys of each side
  alignas(64) float sums[query_block * max_width];
  KeyTile tile;
  alignas(64) float side_scores[2][key_tile * query_block];
  float* scores = side_scores[0];
  Softmax softmax;
  for (int i = 0; i < query_block; ++i) {
    softmax.row_max[i] = minus_infinity;
    softmax.row_sum[i] = 0;
  }
  const Block block = block_of(sequence, first);
  const std::int64_t width = args.q.shape[2], length = padded(width);
  for (int side = 0; side <= last_side(decay, block); ++side) {
    const Rows q = stage_queries(sequence.query_rows<T>(args.q, first), args.q.strides[0], block, width,
                                 decay, side, tile.rows[0]);
    transpose(q, block.rows, width, 1.0f / __builtin_sqrtf(static_cast<float>(width)), q_columns[side]);
  }
  for (std::int64_t key = block.first_key; key < block.keys; key += key_tile) {
    const std::int64_t keys = block.keys - key < key_tile ? block.keys - key : key_tile;
    const bool more = key > block.first_key;
    score_tile(sequence.key_rows<T>(args.k, key), args.k.strides[0], block, decay, key, keys,
               sides_of(decay, block, key, keys), width, q_columns, tile, side_scores);
    if (update_softmax(block.vectors, keys, scores, softmax) && more)
      rescale_rows(softmax, block.rows, length, sums);
    const Rows v = stage(sequence.key_rows<T>(args.v, key), args.v.strides[0], keys, width, tile.rows[0]);
    multiply(
        {scores, 1, query_block, v.data, v.stride, sums, length, block.rows, length / lanes, keys, more, {}});
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
void forward_task(const AttentionForward& args, const XposDecay* decay, std::int64_t begin,
                  std::int64_t head) {
  const std::int64_t end = begin + query_block, count = args.prefix.shape[0];
  for (std::int64_t s = find_sequence(args.offsets, begin); s < count; ++s) {
    const Sequence sequence = sequence_of(args, s, head);
    if (sequence.first_query >= end) break;
    const std::int64_t behind = begin - sequence.first_query;
    std::int64_t first = behind > 0 ? (behind + query_block - 1) / query_block * query_block : 0;
    for (; first < sequence.queries && sequence.first_query + first < end; first += query_block) {
      const std::int64_t rest = sequence.queries - first,
                         stop = first + (rest < query_block ? rest : query_block);
      for (std::int64_t query = first; query < stop; query = sequence.block_end(query))
        forward_block<T>(args, sequence, decay, query);
    }
  }
}

}  // namespace

void attention_forward(const AttentionForward& args) noexcept {
  const std::int64_t blocks = (args.q.shape[0] + query_block - 1) / query_block, heads = args.q.shape[1];
  const std::int64_t groups = (blocks + blocks_together - 1) / blocks_together;
  XposDecay table;
  const XposDecay* decay = fill_decay(args.log_decay, table);
  with_element(args.q.dtype, [&](auto* element) {
    const std::int64_t tasks = groups * heads * blocks_together;
    parallel_for(tasks, tasks_of_block(args, tasks), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t group = task / blocks_together / heads, head = task / blocks_together % heads;
        const std::int64_t block = group * blocks_together + task % blocks_together;
        if (block < blocks)
          forward_task<std::remove_pointer_t<decltype(element)>>(args, decay, block * query_block, head);
      }
    });
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
