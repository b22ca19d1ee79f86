#include "ops/attention_tiles.h"

namespace hrmcore::HRMCORE_ISA {
namespace {

// What one block of queries brings to its backward. The rows are padded to a whole number of vectors.
struct BackwardBlock {
  alignas(64) float q[2][query_block * max_width];  // for the keys of each side
  alignas(64) float q_columns[2][max_width * query_block];
  alignas(64) float grad_o[query_block * max_width];  // of the ungated output
  alignas(64) float grad_o_columns[max_width * query_block];
  alignas(64) float grad_q[2][query_block * max_width];  // from the keys of each side
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

// sums (keys x width, in the caller's memory) += weights (keys x queries) rows (queries x width), times
// `factors`.
void add_gemm(const float* weights, const Rows& rows, std::int64_t keys, std::int64_t queries,
              std::int64_t width, const Factors& factors, float* sums, std::int64_t sums_stride,
              float* scratch) {
  const std::int64_t length = padded(width);
  Gemm gemm{weights, query_block,    1,       rows.data, rows.stride, sums, sums_stride,
            keys,    length / lanes, queries, true,      factors};
  if (length == width) {
    multiply(gemm);
    return;
  }
  gemm.c = scratch;
  gemm.c_row = length;
  gemm.add = false;
  multiply(gemm);
  for (std::int64_t key = 0; key < keys; ++key) {
    float* row = sums + key * sums_stride;
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(row, column, width,
                    load_columns(row, column, width) + load(scratch + key * length + column));
    }
  }
}

// Writes the gradient of the block's queries: that of the rows which stage_queries made, from the keys of
// each side.
template <class T>
void write_grad_q(const AttentionBackward& args, const Sequence& sequence, const Block& block,
                  const XposDecay* decay, const float (*grads)[query_block * max_width]) {
  const std::int64_t width = args.q.shape[2], length = padded(width);
  const bool both = last_side(decay, block) == 1;
  for (std::int64_t row = 0; row < block.rows; ++row) {
    T* grad_q = sequence.query_rows<T>(args.grad_q, block.first + row);
    for (std::int64_t column = 0; column < width; column += lanes) {
      const std::int64_t cell = row * length + column;
      vfloat grad = load(grads[0] + cell);
      if (decay != nullptr) {
        const std::int64_t same = column < decay->period ? column : column - decay->period;
        grad *= load(decay->power(row - query_edge[0]) + same);
        if (both) grad += load(grads[1] + cell) * load(decay->power(query_edge[1] - row) + same);
      }
      store_columns(grad_q, column, width, grad);
    }
  }
}

template <class T>
void backward_block(const AttentionBackward& args, const Sequence& sequence, const XposDecay* decay,
                    std::int64_t first) {
  KeyTile tile;
  alignas(64) float scratch[key_tile * max_width];
  alignas(64) float scores[2][key_tile * query_block];
  alignas(64) float grads[2][key_tile * query_block];
  BackwardBlock buffer;
  const Block block = block_of(sequence, first);
  const std::int64_t width = args.q.shape[2], length = padded(width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  Rows q[2];
  for (int side = 0; side <= last_side(decay, block); ++side) {
    q[side] = stage_queries(sequence.query_rows<T>(args.q, first), args.q.strides[0], block, width, decay,
                            side, buffer.q[side]);
    transpose(q[side], block.rows, width, scale, buffer.q_columns[side]);
  }
  bool more[2] = {false, false};
  ungate<T>(args, sequence, block, buffer);
  const Rows grad_o{buffer.grad_o, length};
  transpose(grad_o, block.rows, width, 1.0f, buffer.grad_o_columns);
  for (std::int64_t key = block.first_key; key < block.keys; key += key_tile) {
    const std::int64_t keys = block.keys - key < key_tile ? block.keys - key : key_tile;
    const Rows v = stage(sequence.key_rows<T>(args.v, key), args.v.strides[0], keys, width, tile.rows[0]);
    multiply({v.data,
              v.stride,
              1,
              buffer.grad_o_columns,
              query_block,
              grads[0],
              query_block,
              keys,
              block.vectors,
              width,
              false,
              {}});
    const Sides sides = sides_of(decay, block, key, keys);
    score_tile(sequence.key_rows<T>(args.k, key), args.k.strides[0], block, decay, key, keys, sides, width,
               buffer.q_columns, tile, scores);
    softmax_backward(block.vectors, keys, scale, buffer, scores[0], grads[0]);
    if (sides.both()) part_sides(block, key, sides.span[1], grads[0], grads[1]);
    for_each_side(sides, [&](int side, const Span& span) {
      const Rows& k = tile.side[side];
      const float* d_scores = grads[sides.both() ? side : 0] + span.begin * query_block;
      multiply({d_scores,
                1,
                query_block,
                k.data,
                k.stride,
                buffer.grad_q[side],
                length,
                block.rows,
                length / lanes,
                span.count(),
                more[side],
                {}});
      more[side] = true;
      add_gemm(d_scores, q[side], span.count(), block.rows, width, tile.factors(decay, span, side),
               sequence.key_rows<float>(args.grad_k, key + span.begin), args.grad_k.strides[0], scratch);
    });
    add_gemm(scores[0], grad_o, keys, block.rows, width, {}, sequence.key_rows<float>(args.grad_v, key),
             args.grad_v.strides[0], scratch);
  }
  write_grad_q<T>(args, sequence, block, decay, buffer.grad_q);
}

void clear_rows(float* rows, std::int64_t stride, std::int64_t count, std::int64_t width) {
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(rows + row * stride, column, width, vfloat{});
    }
  }
}

template <class T>
void backward_task(const AttentionBackward& args, const Sequence& sequence, const XposDecay* decay) {
  const std::int64_t width = args.q.shape[2];
  clear_rows(sequence.key_rows<float>(args.grad_k, 0), args.grad_k.strides[0], sequence.keys, width);
  clear_rows(sequence.key_rows<float>(args.grad_v, 0), args.grad_v.strides[0], sequence.keys, width);
  for (std::int64_t first = 0; first < sequence.queries; first = sequence.block_end(first)) {
    backward_block<T>(args, sequence, decay, first);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& args) noexcept {
  const std::int64_t heads = args.q.shape[1];
  XposDecay table;
  const XposDecay* decay = fill_decay(args.log_decay, table);
  with_element(args.q.dtype, [&](auto* element) {
    const std::int64_t tasks = args.prefix.shape[0] * heads;
    parallel_for(tasks, tasks_of_block(args, tasks), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        backward_task<std::remove_pointer_t<decltype(element)>>(
            args, sequence_of(args, task / heads, task % heads), decay);
      }
    });
  });
}

}  // namespace hrmcore::HRMCORE_ISA
