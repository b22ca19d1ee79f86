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

// sums (keys x width) += fading of each key to the queries' edge * (weights (keys x queries) rows): what
// stage_keys did, transposed.
void add_faded_product(const float* weights, const Rows& rows, std::int64_t keys, const Block& block,
                       std::int64_t width, std::int64_t key, const Fading& fading, int side, float* sums,
                       std::int64_t sums_stride, float* scratch) {
  const std::int64_t length = padded(width);
  multiply({weights, query_block, 1, rows.data, rows.stride, scratch, length, keys, length / lanes,
            block.rows, false});
  alignas(64) float factor[max_width];
  fade_between(fading, block, key, width, side, factor);
  fade(scratch, length, keys, length, fading, key_edge[side], factor, scratch);
  for (std::int64_t row = 0; row < keys; ++row) {
    float* sum = sums + row * sums_stride;
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(sum, column, width,
                    load_columns(sum, column, width) + load(scratch + row * length + column));
    }
  }
}

// The gradient of the rows that stage_queries made, summed over the sides, in those of side 0.
void join_sides(const Fading& fading, const Block& block, std::int64_t width,
                float (*grads)[query_block * max_width]) {
  const std::int64_t length = padded(width);
  for (int side = 0; side <= last_side(&fading, block); ++side)
    fade(grads[side], length, block.rows, length, fading, query_edge[side], nullptr, grads[side]);
  if (last_side(&fading, block) == 0) return;
  for (std::int64_t i = 0; i < block.rows * length; i += lanes)
    store(grads[0] + i, load(grads[0] + i) + load(grads[1] + i));
}

template <class T>
void backward_block(const AttentionBackward& args, const Sequence& sequence, const Fading* fading,
                    std::int64_t first) {
  alignas(64) float tile[key_tile * max_width];
  alignas(64) float scratch[key_tile * max_width];
  alignas(64) float scores[2][key_tile * query_block];
  alignas(64) float grads[2][key_tile * query_block];
  BackwardBlock buffer;
  const Block block = block_of(sequence, first);
  const std::int64_t width = args.q.shape[2], length = padded(width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  Rows q[2];
  for (int side = 0; side <= last_side(fading, block); ++side) {
    q[side] = stage_queries(sequence.query_rows<T>(args.q, first), args.q.strides[0], block, width, fading,
                            side, buffer.q[side]);
    transpose(q[side], block.rows, width, scale, buffer.q_columns[side]);
  }
  bool more[2] = {false, false};
  if (fading != nullptr) {
    more[0] = more[1] = true;
    __builtin_memset(buffer.grad_q, 0, sizeof(buffer.grad_q));
  }
  ungate<T>(args, sequence, block, buffer);
  const Rows grad_o{buffer.grad_o, length};
  transpose(grad_o, block.rows, width, 1.0f, buffer.grad_o_columns);
  for (std::int64_t key = block.first_key; key < block.keys; key += key_tile) {
    const std::int64_t keys = block.keys - key < key_tile ? block.keys - key : key_tile;
    const Sides sides = sides_of(fading, block, key, keys);
    const T* key_rows = sequence.key_rows<T>(args.k, key);
    const Rows v = stage(sequence.key_rows<T>(args.v, key), args.v.strides[0], keys, width, tile);
    float *weights = scores[sides.first], *d_scores = grads[sides.first];
    multiply({v.data, v.stride, 1, buffer.grad_o_columns, query_block, d_scores, query_block, keys,
              block.vectors, width, false});
    Rows k;
    for (int side = sides.first; side <= sides.last; ++side) {
      k = stage_keys(key_rows, args.k.strides[0], block, key, keys, width, fading, side, tile);
      multiply({k.data, k.stride, 1, buffer.q_columns[side], query_block, scores[side], query_block, keys,
                block.vectors, width, false});
    }
    if (sides.both()) take_sides(block, key, keys, scores[0], scores[1]);
    hide(block, key, keys, weights);
    softmax_backward(block.vectors, keys, scale, buffer, weights, d_scores);
    if (sides.both()) part_sides(block, key, keys, grads[0], grads[1]);
    for (int side = sides.first; side <= sides.last; ++side) {
      if (sides.both())
        k = stage_keys(key_rows, args.k.strides[0], block, key, keys, width, fading, side, tile);
      multiply({grads[side], 1, query_block, k.data, k.stride, buffer.grad_q[side], length, block.rows,
                length / lanes, keys, more[side]});
      more[side] = true;
      float* grad_k = sequence.key_rows<float>(args.grad_k, key);
      if (fading == nullptr) {
        add_product(grads[0], q[0], keys, block.rows, width, grad_k, args.grad_k.strides[0], scratch);
      } else {
        add_faded_product(grads[side], q[side], keys, block, width, key, *fading, side, grad_k,
                          args.grad_k.strides[0], scratch);
      }
    }
    add_product(weights, grad_o, keys, block.rows, width, sequence.key_rows<float>(args.grad_v, key),
                args.grad_v.strides[0], scratch);
  }
  if (fading != nullptr) join_sides(*fading, block, width, buffer.grad_q);
  for (std::int64_t row = 0; row < block.rows; ++row) {
    T* grad_q = sequence.query_rows<T>(args.grad_q, first + row);
    for (std::int64_t column = 0; column < width; column += lanes) {
      store_columns(grad_q, column, width, load(buffer.grad_q[0] + row * length + column));
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
void backward_task(const AttentionBackward& args, const Sequence& sequence, const Fading* fading) {
  const std::int64_t width = args.q.shape[2];
  clear_rows(sequence.key_rows<float>(args.grad_k, 0), args.grad_k.strides[0], sequence.keys, width);
  clear_rows(sequence.key_rows<float>(args.grad_v, 0), args.grad_v.strides[0], sequence.keys, width);
  for (std::int64_t first = 0; first < sequence.queries; first = sequence.block_end(first)) {
    backward_block<T>(args, sequence, fading, first);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& args) noexcept {
  const std::int64_t heads = args.q.shape[1];
  Fading rates;
  const Fading* fading = fill_fading(args.rates, rates);
  with_element(args.q.dtype, [&](auto* element) {
    const std::int64_t tasks = args.prefix.shape[0] * heads;
    parallel_for(tasks, tasks_of_block(args, tasks), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        backward_task<std::remove_pointer_t<decltype(element)>>(
            args, sequence_of(args, task / heads, task % heads), fading);
      }
    });
  });
}

}  // namespace hrmcore::HRMCORE_ISA
