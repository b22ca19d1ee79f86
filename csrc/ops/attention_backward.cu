#include "ops/attention_mma.cuh"

// Nothing is added up through memory: one kernel owns a tile of queries and sums grad_q over the keys, others own
// a tile of keys and sum over the queries that see them. All compute the weights again from lse. Under xPos
// grad_q and grad_k are sums over decayed rows until a side is through.
//
// float32: three kernels, since the sums of grad_k and grad_v together take more registers at head_dim 128 than a
// thread has; those of keys take the gate's derivative again for every tile.
//
// bfloat16: two. That of queries runs first and leaves dO, lse and delta to that of keys, which holds its weights
// in bfloat16: so both sums fit.

namespace hrmcore::cuda {
namespace {

// Rows of dO = grad_out * sigmoid(gate) into a tile, rounded to the inputs' dtype, and delta = sum grad_out *
// out. A warp a row. `grad_gate` is written where it is given.
template <class T, int columns>
__device__ __forceinline__ void load_ungated(SharedArray<T> tile, SharedArray<float> delta,
                                             const AttentionBackward& args, const TensorView* grad_gate,
                                             std::int64_t first, int count) {
  for (int row = warp_id(); row < block_rows<T>; row += warps<T>) {
    float sum = 0;
#pragma unroll
    for (int column = lane_id(); column < columns; column += 32) {
      T element{};
      if (row < count && column < args.q.shape[2]) {
        const float grad = load<1>(head_row<T>(args.grad_out, first + row) + column)[0];
        const float out = load<1>(head_row<T>(args.out, first + row) + column)[0];
        const float open = sigmoid(load<1>(head_row<T>(args.gate, first + row) + column)[0]);
        assign(element, grad * open);
        sum += grad * out;
        if (grad_gate != nullptr) {
          store<1>(head_row<T>(*grad_gate, first + row) + column, {{grad * out * (1.0f - open)}});
        }
      }
      tile[row * row_length<T>(columns) + column] = element;
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) delta[row] = sum;
  }
}

__device__ __forceinline__ float lse_of(const AttentionBackward& args, std::int64_t row) {
  return load<1>(args.lse.as<float>() + row * args.lse.strides[0] + blockIdx.y)[0];
}

// The warp's rows of a sum, times `scale`, to their places in a packed tensor.
template <bool wide, class E, int n>
__device__ __forceinline__ void store_pairs(const TensorView& tensor, std::int64_t first_row, int rows,
                                            const float (&sums)[n][4], float scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * warp_id() + lane_id() / 4 + 8 * r;
    if (row >= rows) continue;
    E* out = head_row<E>(tensor, first_row + row);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const int column = 8 * j + lane_id() % 4 * 2;
      if (column >= tensor.shape[2]) break;
      store_pair<wide>(out + column, sums[j][2 * r] * scale, sums[j][2 * r + 1] * scale);
    }
  }
}

template <class T, int columns, bool wide>
__global__ void __launch_bounds__(block_threads<T>, resident_blocks)
    backward_queries(AttentionBackward args) {
  constexpr int tile = block_rows<T>, length = row_length<T>(columns), grads_length = row_length<T>(tile);
  const Sequence sequence = sequence_of_block<T>(args, false);
  if (sequence.index < 0) return;
  const SharedArray<T> q = shared_array<T>(0), grad_o = q + tile * length;
  const SharedArray<T> keys = grad_o + tile * length, values = keys + tile * length;
  const SharedArray<T> grads = values + tile * length + warp_id() * 16 * grads_length;
  const SharedArray<float> delta =
      shared_array<float>(4 * tile_bytes<T>(tile, columns) + tile_bytes<T>(tile, tile));
  const int g = lane_id() / 4, h = lane_id() % 4, own = 16 * warp_id();
  const int rows = min(sequence.queries - sequence.first_row, tile);
  const int position = sequence.position(sequence.first_row);
  const float scale = 1.0f / sqrtf(static_cast<float>(args.q.shape[2]));
  const std::int64_t first_row = sequence.first_query + sequence.first_row;
  const bool xpos = args.log_decay.given();

  load_ungated<T, columns>(grad_o, delta, args, &args.grad_gate, first_row, rows);
  float lse[2];
  for (int r = 0; r < 2; ++r) lse[r] = lse_of(args, first_row + min(own + g + 8 * r, rows - 1));

  float grad_q[columns / 8][4] = {};
  const int sides = count_of_sides(xpos, sequence.prefix > position + 1);
#pragma unroll 1
  for (int visit = 0; visit < sides; ++visit) {
    const Side side = side_of_visit(xpos, visit);
    const Span span = sequence.keys_of_block(rows, side, tile);
    const Edge edge = edge_of_block(position, tile, side == Side::after ? 1 : -1);
    if (visit > 0) decay_fragments<columns>(grad_q, args.log_decay, position, edge, true);
    load_tile<T, columns, wide>(q, args.q, first_row, rows);
    commit_copies();
#pragma unroll 1
    for (int key = span.begin; key < span.end; key += tile) {
      load_tile<T, columns, wide>(keys, args.k, sequence.first_key + key, sequence.keys - key);
      load_tile<T, columns, wide>(values, args.v, sequence.first_key + key, sequence.keys - key);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      if (xpos) {
        if (key == span.begin) decay_tile<T, columns>(q, args.log_decay, position, edge, true);
        decay_tile<T, columns>(keys, args.log_decay, key, edge, false);
        __syncthreads();
      }
      float s[tile / 8][4] = {}, d[tile / 8][4] = {};
      multiply<tile, columns, false, length, length>(s, q + own * length, keys);
      multiply<tile, columns, false, length, length>(d, grad_o + own * length, values);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = sequence.first_row + min(own + g + 8 * r, rows - 1);
        const int low = sequence.low(query, side) - key, high = sequence.high(query, side) - key;
        const float shift = delta[own + g + 8 * r];
#pragma unroll
        for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = 8 * j + 2 * h + i, at = 2 * r + i;
            const bool seen = column >= low && column < high;
            d[j][at] = seen ? expf(s[j][at] * scale - lse[r]) * (d[j][at] - shift) : 0.0f;
          }
        }
      }
      store_fragments<T, tile, grads_length>(grads, d);
      __syncwarp();
      multiply<columns, tile, true, grads_length, length>(grad_q, grads, keys);
      __syncthreads();
    }
    wait_for_copies<0>();
    if (xpos) decay_fragments<columns>(grad_q, args.log_decay, position, edge, false);
  }
  store_pairs<wide, T>(args.grad_q, first_row, rows, grad_q, scale);
}

// The gradient that a block of keys sums up.
enum class Of { keys, values };

template <class T, int columns, bool wide, Of of>
__global__ void __launch_bounds__(block_threads<T>, resident_blocks) backward_keys(AttentionBackward args) {
  constexpr int tile = block_rows<T>, length = row_length<T>(columns), weights_length = row_length<T>(tile);
  const Sequence sequence = sequence_of_block<T>(args, true);
  if (sequence.index < 0) return;
  const SharedArray<T> keys = shared_array<T>(0), values = keys + tile * length, q = values + tile * length;
  const SharedArray<T> grad_o = q + tile * length;
  const SharedArray<T> weights = grad_o + tile * length + warp_id() * 16 * weights_length;
  const SharedArray<float> delta =
      shared_array<float>(4 * tile_bytes<T>(tile, columns) + tile_bytes<T>(tile, tile));
  const SharedArray<float> lse = delta + tile;
  const int g = lane_id() / 4, h = lane_id() % 4, own = 16 * warp_id();
  const int rows = min(sequence.keys - sequence.first_row, tile);
  const float scale = 1.0f / sqrtf(static_cast<float>(args.q.shape[2]));
  const std::int64_t first_row = sequence.first_key + sequence.first_row;
  const bool xpos = args.log_decay.given();

  if (of == Of::keys) load_tile<T, columns, wide>(values, args.v, first_row, rows);
  float sums[columns / 8][4] = {};
  const int sides = count_of_sides(xpos, sequence.prefix > sequence.first_row);
#pragma unroll 1
  for (int visit = 0; visit < sides; ++visit) {
    const Side side = side_of_visit(xpos, visit);
    const Span span = sequence.queries_of_block(rows, side);
    const Edge edge = edge_of_block(sequence.first_row, tile, side == Side::after ? -1 : 1);
    const bool decays_sums = xpos && of == Of::keys;
    if (visit > 0 && decays_sums)
      decay_fragments<columns>(sums, args.log_decay, sequence.first_row, edge, true);
    load_tile<T, columns, wide>(keys, args.k, first_row, rows);
    commit_copies();
#pragma unroll 1
    for (int query = span.begin; query < span.end; query += tile) {
      const int count = min(sequence.queries - query, tile);
      load_tile<T, columns, wide>(q, args.q, sequence.first_query + query, count);
      load_ungated<T, columns>(grad_o, delta, args, nullptr, sequence.first_query + query, count);
      for (int i = static_cast<int>(threadIdx.x); i < count; i += block_threads<T>) {
        lse[i] = lse_of(args, sequence.first_query + query + i);
      }
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      if (xpos) {
        if (query == span.begin) {
          decay_tile<T, columns>(keys, args.log_decay, sequence.first_row, edge, true);
        }
        decay_tile<T, columns>(q, args.log_decay, sequence.position(query), edge, false);
        __syncthreads();
      }
      // transposed: rows are keys, columns are queries
      float s[tile / 8][4] = {}, d[tile / 8][4] = {};
      multiply<tile, columns, false, length, length>(s, keys + own * length, q);
      if (of == Of::keys) multiply<tile, columns, false, length, length>(d, values + own * length, grad_o);
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * j + 2 * h + i;
          const int low = sequence.low(query + column, side), high = sequence.high(query + column, side);
          const float base = column < count ? static_cast<float>(lse[column]) : 0.0f;
          const float shift = delta[column];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int key = sequence.first_row + own + g + 8 * r;
            const bool seen = column < count && key >= low && key < high;
            float& weight = s[j][2 * r + i];
            weight = seen ? expf(weight * scale - base) : 0.0f;
            if (of == Of::keys && seen) weight *= d[j][2 * r + i] - shift;
          }
        }
      }
      store_fragments<T, tile, weights_length>(weights, s);
      __syncwarp();
      multiply<columns, tile, true, weights_length, length>(sums, weights, of == Of::keys ? q : grad_o);
      __syncthreads();
    }
    wait_for_copies<0>();
    if (decays_sums) decay_fragments<columns>(sums, args.log_decay, sequence.first_row, edge, false);
  }
  if (of == Of::keys) {
    store_pairs<wide, float>(args.grad_k, first_row, rows, sums, scale);
  } else {
    store_pairs<wide, float>(args.grad_v, first_row, rows, sums, 1.0f);
  }
}

template <class T>
constexpr int shared_bytes(int columns) {
  return 4 * tile_bytes<T>(block_rows<T>, columns) + tile_bytes<T>(block_rows<T>, block_rows<T>) +
         2 * block_rows<T> * static_cast<int>(sizeof(float));
}
static_assert(shared_bytes<float>(128) <= most_shared_bytes);

// ---- bfloat16

// For a block's rows, 16 bytes at a time: dO = grad_out * sigmoid(gate) and grad_gate; delta = sum grad_out * out.
// dO goes to a tile, too.
template <int columns, bool wide>
__device__ __forceinline__ void ungate(const AttentionBackward& args, std::int64_t first, int rows,
                                       SharedArray<bf16> grad_o, SharedArray<float> delta) {
  constexpr int piece = wide ? widest<bf16> : 1, lanes = wide ? columns / piece : 32;  // that share a row
  const int head_dim = static_cast<int>(args.q.shape[2]);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / lanes; row < tile; row += mma_threads / lanes) {
    float sum = 0;
#pragma unroll
    for (int column = lane_id() % lanes * piece; column < columns; column += lanes * piece) {
      Packed<bf16, piece> rounded{};
      if (row < rows && column < head_dim) {
        const Floats<piece> grad = load<piece>(head_row<bf16>(args.grad_out, first + row) + column);
        const Floats<piece> out = load<piece>(head_row<bf16>(args.out, first + row) + column);
        const Floats<piece> gate = load<piece>(head_row<bf16>(args.gate, first + row) + column);
        Floats<piece> grad_gate;
#pragma unroll
        for (int i = 0; i < piece; ++i) {
          const float open = quick_sigmoid(gate[i]), product = grad[i] * out[i];
          assign(rounded.at[i], grad[i] * open);
          grad_gate[i] = product * (1.0f - open);
          sum += product;
        }
        store_packed<piece>(head_row<bf16>(args.ungated, first + row) + column, rounded);
        store<piece>(head_row<bf16>(args.grad_gate, first + row) + column, grad_gate);
      }
      store_shared<piece>(grad_o + (row * row_length<bf16>(columns) + column), rounded);
    }
#pragma unroll
    for (int by = lanes / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (lane_id() % lanes == 0) delta[row] = sum;
  }
}

// Where the block's head has its lse / log 2 (of = 0) or its delta (of = 1), from a packed row on.
__device__ __forceinline__ float* row_term(const AttentionBackward& args, int of, std::int64_t row) {
  const std::int64_t tokens = args.q.shape[0];
  return args.row_terms.as<float>() + (of * args.q.shape[1] + blockIdx.y) * tokens + row;
}

// How often a block of queries, or of keys, goes through what it visits; 0 for an empty line.
__device__ __forceinline__ int sides_of_queries(const Sequence& sequence, bool xpos) {
  const bool any_after = sequence.prefix > sequence.position(sequence.first_row) + 1;
  return sequence.index < 0 ? 0 : count_of_sides(xpos, any_after);
}
__device__ __forceinline__ int sides_of_keys(const Sequence& sequence, bool xpos) {
  return sequence.index < 0 ? 0 : count_of_sides(xpos, sequence.prefix > sequence.first_row);
}

template <int columns, bool wide, bool xpos>
__global__ void __launch_bounds__(mma_threads, resident_blocks) backward_queries_mma(AttentionBackward args) {
  constexpr int tile_size = tile * row_length<bf16>(columns);
  // Read again for each visit: there are no registers to keep it in.
  const auto line = [&] {
    return sequence_of_line(args.tiles.as<std::int32_t>() + blockIdx.x * line_ints,
                            static_cast<int>(args.window));
  };
  const int sides = sides_of_queries(line(), xpos);
  if (sides == 0) return;
  // two stages of keys and values; q and dO pass through the second on their way to registers
  const SharedArray<bf16> keys = shared_array<bf16>(0), values = keys + 2 * tile_size;
  const SharedArray<bf16> queries = keys + tile_size, grads = values + tile_size;
  const SharedArray<float> deltas = shared_array<float>(4 * tile_bytes<bf16>(tile, columns));
  const int own = 16 * warp_id();
  const float scale = quick_reciprocal_root(static_cast<float>(args.q.shape[2]));

  float grad_q[columns / 8][4] = {}, lse[2], delta[2];
  std::uint32_t q[columns / 16][4], grad_o[columns / 16][4];
#pragma unroll 1
  for (int visit = 0; visit < (xpos ? sides : 1); ++visit) {
    const Sequence sequence = line();
    const int rows = min(sequence.queries - sequence.first_row, tile);
    const int position = sequence.position(sequence.first_row);
    const std::int64_t first_row = sequence.first_query + sequence.first_row;
    const Side side = side_of_visit(xpos, visit);
    const Span span = sequence.keys_of_block(rows, side, tile);
    const Edge edge = edge_of_block(position, tile, side == Side::after ? 1 : -1);
    RowLoader<columns, wide>(args.q, first_row).load(queries, rows);
    commit_copies();
    RowLoader<columns, wide> key_rows(args.k, sequence.first_key + span.begin);
    RowLoader<columns, wide> value_rows(args.v, sequence.first_key + span.begin);
    key_rows.load(keys, sequence.keys - span.begin);
    value_rows.load(values, sequence.keys - span.begin);
    commit_copies();
    if (visit == 0) ungate<columns, wide>(args, first_row, rows, grads, deltas);
    wait_for_copies<1>();
    __syncthreads();
    if (xpos) {
      decay_tile<bf16, columns>(queries, args.log_decay, position, edge, true);
      __syncthreads();
      if (visit > 0) decay_fragments<columns>(grad_q, args.log_decay, position, edge, true);
    }
    load_fragments<columns>(q, queries + own * row_length<bf16>(columns));
    if (visit == 0) {
      load_fragments<columns>(grad_o, grads + own * row_length<bf16>(columns));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = own + lane_id() / 4 + 8 * r;
        lse[r] = log2_e * lse_of(args, first_row + min(row, rows - 1));
        delta[r] = deltas[row];
        if (lane_id() % 4 == 0 && row < rows) {
          store<1>(row_term(args, 0, first_row + row), {{lse[r]}});
          store<1>(row_term(args, 1, first_row + row), {{delta[r]}});
        }
      }
    }

    Span seen[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = sequence.first_row + min(own + lane_id() / 4 + 8 * r, rows - 1);
      seen[r] = {sequence.low(query, side), sequence.high(query, side)};
    }
    const Span seen_by_all{sequence.low(sequence.first_row + rows - 1, side),
                           sequence.high(sequence.first_row, side)};
#pragma unroll 1
    for (int key = span.begin, stage = 0; key < span.end; key += tile, stage ^= tile_size) {
      wait_for_copies<0>();
      __syncthreads();  // the tile is there, and nobody reads the other stage any more
      if (const int next = key + tile; next < span.end) {
        key_rows.load(keys + (stage ^ tile_size), sequence.keys - next);
        value_rows.load(values + (stage ^ tile_size), sequence.keys - next);
        commit_copies();
      }
      if (xpos) {
        decay_tile<bf16, columns>(keys + stage, args.log_decay, key, edge, false);
        __syncthreads();
      }
      float s[tile / 8][4] = {}, d[tile / 8][4] = {};
      multiply_transposed<columns>(s, q, keys + stage);
      if (key < seen_by_all.begin || key + tile > seen_by_all.end) hide_unseen(s, seen, key);
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = quick_exp2(s[j][i] * (scale * log2_e) - lse[i / 2]);
      }
      multiply_transposed<columns>(d, grad_o, values + stage);
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] *= d[j][i] - delta[i / 2];
      }
      std::uint32_t weights[tile / 16][4];
      pack_fragments(weights, s);
      multiply_rows<columns>(grad_q, weights, keys + stage);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (xpos) decay_fragments<columns>(grad_q, args.log_decay, position, edge, false);
  }
  const Sequence sequence = line();
  store_gradient<columns, wide>(args.grad_q, sequence.first_query + sequence.first_row,
                                min(sequence.queries - sequence.first_row, tile), grad_q, scale, args.table,
                                args.positions);
}

// Shared memory of a block of keys.
template <int columns>
constexpr int own_bytes_of_keys = 2 * tile_bytes<bf16>(tile, columns) + 2 * tile * 4;
template <int columns>
constexpr int stage_bytes_of_keys = 2 * tile_bytes<bf16>(tile, columns) + 2 * tile * 4;

struct KeysPass {
  AttentionBackward args;
  int first_line;  // of the table over keys
  int stages;      // of queries and dO in shared memory, 1 or 2
};

// Weights by a key's rows to their gradients, in place: both in bfloat16, pairs as a product takes them.
__device__ __forceinline__ void differentiate(std::uint32_t (&weights)[tile / 16][4],
                                              const float (&d)[tile / 8][4], SharedArray<float> delta) {
#pragma unroll
  for (int j = 0; j < tile / 8; ++j) {
    const Packed<float, 2> shift = load_shared<2>(delta + (8 * j + lane_id() % 4 * 2));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      std::uint32_t& pair = weights[j / 2][j % 2 * 2 + r];
      const float first = __uint_as_float(pair << 16), second = __uint_as_float(pair & 0xffff0000u);
      pair = to_bf16x2(first * (d[j][2 * r] - shift.at[0]), second * (d[j][2 * r + 1] - shift.at[1]));
    }
  }
}

template <int columns, bool wide, bool xpos>
__global__ void __launch_bounds__(mma_threads, resident_blocks) backward_keys_mma(KeysPass pass) {
  constexpr int length = row_length<bf16>(columns), tile_size = tile * length;
  const AttentionBackward& args = pass.args;
  const auto line = [&] {  // as for queries
    return sequence_of_line(args.tiles.as<std::int32_t>() + (pass.first_line + blockIdx.x) * line_ints,
                            static_cast<int>(args.window));
  };
  const int sides = sides_of_keys(line(), xpos);
  if (sides == 0) return;
  // keys and values of the block and what sees them; then a stage of q, dO, lse and delta, or two
  constexpr int ahead = wide && !xpos ? columns / 16 : 4;  // the others have no registers to spare
  constexpr int own_bytes = own_bytes_of_keys<columns>, stage_bytes = stage_bytes_of_keys<columns>;
  const SharedArray<bf16> keys = shared_array<bf16>(0), values = keys + tile_size;
  const SharedArray<int> seen_by_row = shared_array<int>(2 * tile_bytes<bf16>(tile, columns));
  const int own = 16 * warp_id();
  const float scale = quick_reciprocal_root(static_cast<float>(args.q.shape[2]));

  float grad_k[columns / 8][4] = {}, grad_v[columns / 8][4] = {};
#pragma unroll 1
  for (int visit = 0; visit < (xpos ? sides : 1); ++visit) {
    const Sequence sequence = line();
    const int rows = min(sequence.keys - sequence.first_row, tile);
    const std::int64_t first_row = sequence.first_key + sequence.first_row;
    const Side side = side_of_visit(xpos, visit);
    const Span span = sequence.queries_of_block(rows, side);
    const Edge edge = edge_of_block(sequence.first_row, tile, side == Side::after ? -1 : 1);
    if (visit > 0) decay_fragments<columns>(grad_k, args.log_decay, sequence.first_row, edge, true);
    RowLoader<columns, wide>(args.k, first_row).load(keys, rows);
    if (visit == 0) RowLoader<columns, wide>(args.v, first_row).load(values, rows);

    RowLoader<columns, wide> query_rows(args.q, sequence.first_query + span.begin);
    RowLoader<columns, wide> grad_rows(args.ungated, sequence.first_query + span.begin);
    const auto fetch = [&](int query, int stage) {
      const int at = own_bytes + stage * stage_bytes;
      const int left = sequence.queries - query, thread = static_cast<int>(threadIdx.x);
      query_rows.load(shared_array<bf16>(at), left);
      grad_rows.load(shared_array<bf16>(at) + tile_size, left);
      copy_async_element((shared_array<float>(at + 2 * tile_bytes<bf16>(tile, columns)) + thread).data,
                         row_term(args, thread / tile, sequence.first_query + query + thread % tile),
                         thread % tile < left);
      commit_copies();
    };
    fetch(span.begin, 0);

    if (threadIdx.x < tile) {
      const int row = static_cast<int>(threadIdx.x), key = sequence.first_row + min(row, rows - 1);
      const Span span_of_row = sequence.queries_of_keys(key, key, side);
      store_shared<2>(seen_by_row + 2 * row, Packed<int, 2>{{span_of_row.begin, span_of_row.end}});
    }
    const int first_key = sequence.first_row, last_key = first_key + rows - 1;
    const Span sees_all{sequence.queries_of_keys(last_key, last_key, side).begin,
                        sequence.queries_of_keys(first_key, first_key, side).end};
#pragma unroll 1
    for (int query = span.begin, stage = 0; query < span.end; query += tile) {
      const bool more = query + tile < span.end;
      wait_for_copies<0>();
      __syncthreads();  // the tile is there, and nobody reads the other stage any more
      if (more && pass.stages == 2) fetch(query + tile, stage ^ 1);
      const int at = own_bytes + stage * stage_bytes;
      const SharedArray<bf16> q = shared_array<bf16>(at), grad_o = q + tile_size;
      const SharedArray<float> lse = shared_array<float>(at + 2 * tile_bytes<bf16>(tile, columns));
      if (xpos) {
        if (query == span.begin) {
          decay_tile<bf16, columns>(keys, args.log_decay, sequence.first_row, edge, true);
        }
        decay_tile<bf16, columns>(q, args.log_decay, sequence.position(query), edge, false);
        __syncthreads();
      }
      // transposed: rows are keys, columns are queries
      std::uint32_t weights[tile / 16][4];
      {
        float s[tile / 8][4] = {};
        multiply_transposed<columns, ahead>(s, keys + own * length, q);
        if (query < sees_all.begin || query + tile > sees_all.end) {
          Span seen[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const Packed<int, 2> ends = load_shared<2>(seen_by_row + 2 * (own + lane_id() / 4 + 8 * r));
            seen[r] = {ends.at[0], ends.at[1]};
          }
          hide_unseen(s, seen, query);
        }
#pragma unroll
        for (int j = 0; j < tile / 8; ++j) {
          const Packed<float, 2> base = load_shared<2>(lse + (8 * j + lane_id() % 4 * 2));
#pragma unroll
          for (int i = 0; i < 4; ++i) s[j][i] = quick_exp2(s[j][i] * (scale * log2_e) - base.at[i % 2]);
        }
        pack_fragments(weights, s);
      }
      multiply_rows<columns>(grad_v, weights, grad_o);
      {
        float d[tile / 8][4] = {};
        multiply_transposed<columns, ahead>(d, values + own * length, grad_o);
        differentiate(weights, d, lse + tile);
      }
      multiply_rows<columns>(grad_k, weights, q);
      if (pass.stages == 2) {
        stage ^= 1;
      } else if (more) {
        __syncthreads();
        fetch(query + tile, 0);
      }
    }
    wait_for_copies<0>();
    __syncthreads();
    if (xpos) decay_fragments<columns>(grad_k, args.log_decay, sequence.first_row, edge, false);
  }
  const Sequence sequence = line();
  const int rows = min(sequence.keys - sequence.first_row, tile);
  const std::int64_t first_row = sequence.first_key + sequence.first_row;
  if (args.grad_k.dtype == DType::bf16) {
    store_gradient<columns, wide>(args.grad_k, first_row, rows, grad_k, scale, args.table, args.positions);
  } else {
    store_sums<columns, wide, float>(args.grad_k, first_row, rows, grad_k, scale);
  }
  if (args.grad_v.dtype == DType::bf16) {
    store_sums<columns, wide, bf16>(args.grad_v, first_row, rows, grad_v, 1.0f);
  } else {
    store_sums<columns, wide, float>(args.grad_v, first_row, rows, grad_v, 1.0f);
  }
}

template <int columns>
constexpr int bytes_of_queries = 4 * tile_bytes<bf16>(tile, columns) + tile * 4;
template <int columns, int stages>
constexpr int bytes_of_keys = own_bytes_of_keys<columns> + stages * stage_bytes_of_keys<columns>;
static_assert(bytes_of_queries<128> <= most_shared_bytes && bytes_of_keys<128, 1> <= most_shared_bytes);
static_assert(sums_bytes<128> <= bytes_of_queries<128> && sums_bytes<128> <= bytes_of_keys<128, 1>);

// Two stages where that leaves room for as many blocks as registers do; the system keeps 1 KB of each block's.
template <int columns>
int stages_of_keys() {
  return resident_blocks * (bytes_of_keys<columns, 2> + 1024) <= shared_bytes_of_multiprocessor() ? 2 : 1;
}

const char* launch_mma(const AttentionBackward& args, bool wide, void* stream) {
  if (!args.tiles.given() || !args.ungated.given() || !args.row_terms.given())
    return "bfloat16 on CUDA needs `tiles`, `ungated` and `row_terms`";
  return with_columns(args.q, wide, args.log_decay.given(), [&](auto columns, auto wideness, auto xpos) {
    constexpr int width = columns();
    const LaunchShape queries{grid_of_table(args.q, args.prefix), mma_threads, bytes_of_queries<width>};
    const char* error = launch(backward_queries_mma<width, wideness(), xpos()>, queries, args, stream);
    if (error != nullptr) return error;
    const KeysPass pass{args, static_cast<int>(queries.grid.x), stages_of_keys<width>()};
    const std::size_t keys_bytes = pass.stages == 2 ? bytes_of_keys<width, 2> : bytes_of_keys<width, 1>;
    const LaunchShape keys{grid_of_table(args.k, args.prefix), mma_threads, keys_bytes};
    return launch(backward_keys_mma<width, wideness(), xpos()>, keys, pass, stream);
  });
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(attention_backward, hrmcore::AttentionBackward) {
  using namespace hrmcore::cuda;
  if (const char* reason = unsupported_reason(args)) return reason;
  if (args.q.dtype == hrmcore::DType::bf16) {
    const bool wide =
        rows_are_wide({&args.q, &args.k, &args.v, &args.gate, &args.out, &args.grad_out, &args.ungated,
                       &args.grad_q, &args.grad_k, &args.grad_v, &args.grad_gate});
    const bool wide_table = !args.table.given() || rows_are_wide({&args.table});
    return launch_mma(args, wide && wide_table, stream);
  }
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.grad_q, &args.grad_k, &args.grad_v});
  return with_tiles(args.q, wide, [&](auto columns, auto wideness) {
    constexpr int threads = block_threads<float>, width = columns();
    const LaunchShape queries{grid_for<float>(args.q, args.prefix), threads, shared_bytes<float>(width)};
    const LaunchShape keys{grid_for<float>(args.k, args.prefix), threads, shared_bytes<float>(width)};
    const char* error = launch(backward_queries<float, width, wideness()>, queries, args, stream);
    if (error == nullptr)
      error = launch(backward_keys<float, width, wideness(), Of::keys>, keys, args, stream);
    if (error == nullptr)
      error = launch(backward_keys<float, width, wideness(), Of::values>, keys, args, stream);
    return error;
  });
}
