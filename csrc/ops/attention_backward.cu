#include "ops/attention_tiles.cuh"

// Two kernels, so that nothing is added up through memory: one owns a tile of queries and sums grad_q over
// the keys, the other owns a tile of keys and sums grad_k and grad_v over the queries that see them. Both
// compute the weights again from lse. The gate's derivative is taken where the gradient of the output is
// read: the second kernel does that again for every tile of keys, from the cache, which costs it no memory of
// the caller's.

namespace hrmcore::cuda {
namespace {

// Rows of dO = grad_out * sigmoid(gate) into a tile, rounded to the inputs' dtype, and delta = sum grad_out *
// out. A warp a row. `grad_gate` is written where it is given.
template <class T, int columns>
__device__ __forceinline__ void load_ungated(SharedArray<T> tile, SharedArray<float> delta,
                                             const AttentionBackward& args, const TensorView* grad_gate,
                                             std::int64_t first, int count) {
  for (int row = warp_id(); row < tile_rows<T>; row += warps<T>) {
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

template <class T, int columns, bool wide>
__global__ void __launch_bounds__(block_threads<T>) backward_queries(AttentionBackward args) {
  constexpr int tile = tile_rows<T>, length = row_length<T>(columns), grads_length = row_length<T>(tile);
  const Sequence sequence = sequence_of_block<T>(args, false);
  if (sequence.index < 0) return;
  const SharedArray<T> q = shared_array<T>(0), grad_o = q + tile * length, keys = grad_o + tile * length;
  const SharedArray<T> values = keys + tile * length, block_grads = values + tile * length;
  const SharedArray<T> grads = block_grads + warp_id() * 16 * grads_length;
  const SharedArray<float> delta =
      shared_array<float>(4 * tile_bytes<T>(tile, columns) + tile_bytes<T>(tile, tile));
  const int g = lane_id() / 4, h = lane_id() % 4, own = 16 * warp_id();
  const int rows = min(sequence.queries - sequence.first_row, block_rows<T>);
  const int begin = sequence.low(sequence.first_row) / tile * tile;
  const int end = sequence.high(sequence.first_row + rows - 1);
  const float scale = 1.0f / sqrtf(static_cast<float>(args.q.shape[2]));
  const std::int64_t first_row = sequence.first_query + sequence.first_row;

  load_tile<T, columns, wide>(q, args.q, first_row, rows);
  commit_copies();
  load_ungated<T, columns>(grad_o, delta, args, &args.grad_gate, first_row, rows);
  float lse[2];
  for (int r = 0; r < 2; ++r) lse[r] = lse_of(args, first_row + min(own + g + 8 * r, rows - 1));

  float grad_q[columns / 8][4] = {};
  for (int key = begin; key < end; key += tile) {
    load_tile<T, columns, wide>(keys, args.k, sequence.first_key + key, sequence.keys - key);
    load_tile<T, columns, wide>(values, args.v, sequence.first_key + key, sequence.keys - key);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    float s[tile / 8][4] = {}, d[tile / 8][4] = {};
    multiply<tile, columns, false, length, length>(s, q + own * length, keys);
    multiply<tile, columns, false, length, length>(d, grad_o + own * length, values);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = sequence.first_row + min(own + g + 8 * r, rows - 1);
      const int low = sequence.low(query) - key, high = sequence.high(query) - key;
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

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = own + g + 8 * r;
    if (row >= rows) continue;
    T* out = head_row<T>(args.grad_q, first_row + row);
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      const int column = 8 * j + 2 * h;
      if (column >= args.q.shape[2]) break;
      store_pair<wide>(out + column, grad_q[j][2 * r] * scale, grad_q[j][2 * r + 1] * scale);
    }
  }
}

// The queries of the sequence that see any of the block's keys, from `begin` up to `end`.
struct Span {
  int begin, end;
};

__device__ __forceinline__ Span queries_that_see(const Sequence& sequence, int rows) {
  const int earliest = sequence.keys - sequence.queries;  // the first query's position
  const int last_key = sequence.first_row + rows - 1;
  Span span{0, sequence.queries};
  if (sequence.first_row >= sequence.prefix) span.begin = max(sequence.first_row - earliest, 0);
  if (sequence.window > 0) {
    span.begin = max(span.begin, (sequence.first_row / sequence.window - 1) * sequence.window - earliest);
    span.end = min(span.end, (last_key / sequence.window + 2) * sequence.window - earliest);
  }
  return span;
}

template <class T, int columns, bool wide>
__global__ void __launch_bounds__(block_threads<T>) backward_keys(AttentionBackward args) {
  constexpr int tile = tile_rows<T>, length = row_length<T>(columns), weights_length = row_length<T>(tile);
  const Sequence sequence = sequence_of_block<T>(args, true);
  if (sequence.index < 0) return;
  const SharedArray<T> keys = shared_array<T>(0), values = keys + tile * length, q = values + tile * length;
  const SharedArray<T> grad_o = q + tile * length, block_weights = grad_o + tile * length;
  const SharedArray<T> weights = block_weights + warp_id() * 16 * weights_length;
  const SharedArray<float> delta =
      shared_array<float>(4 * tile_bytes<T>(tile, columns) + tile_bytes<T>(tile, tile));
  const SharedArray<float> lse = delta + tile;
  const int g = lane_id() / 4, h = lane_id() % 4, own = 16 * warp_id();
  const int rows = min(sequence.keys - sequence.first_row, block_rows<T>);
  const float scale = 1.0f / sqrtf(static_cast<float>(args.q.shape[2]));
  const std::int64_t first_row = sequence.first_key + sequence.first_row;
  const Span span = queries_that_see(sequence, rows);

  load_tile<T, columns, wide>(keys, args.k, first_row, rows);
  load_tile<T, columns, wide>(values, args.v, first_row, rows);
  commit_copies();
  float grad_k[columns / 8][4] = {}, grad_v[columns / 8][4] = {};
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
    // transposed: rows are keys, columns are queries
    float s[tile / 8][4] = {};
    multiply<tile, columns, false, length, length>(s, keys + own * length, q);
#pragma unroll
    for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * h + i;
        const int low = sequence.low(query + column), high = sequence.high(query + column);
        const float base = column < count ? static_cast<float>(lse[column]) : 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = sequence.first_row + own + g + 8 * r;
          const bool seen = column < count && key >= low && key < high;
          s[j][2 * r + i] = seen ? expf(s[j][2 * r + i] * scale - base) : 0.0f;
        }
      }
    }
    store_fragments<T, tile, weights_length>(weights, s);
    __syncwarp();
    multiply<columns, tile, true, weights_length, length>(grad_v, weights, grad_o);
    float d[tile / 8][4] = {};
    multiply<tile, columns, false, length, length>(d, values + own * length, grad_o);
#pragma unroll
    for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = s[j][i], shift = delta[8 * j + 2 * h + i % 2];
        d[j][i] = weight == 0.0f ? 0.0f : weight * (d[j][i] - shift);
      }
    }
    __syncwarp();
    store_fragments<T, tile, weights_length>(weights, d);
    __syncwarp();
    multiply<columns, tile, true, weights_length, length>(grad_k, weights, q);
    __syncthreads();
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = own + g + 8 * r;
    if (row >= rows) continue;
    float* out_k = head_row<float>(args.grad_k, first_row + row);
    float* out_v = head_row<float>(args.grad_v, first_row + row);
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      const int column = 8 * j + 2 * h;
      if (column >= args.q.shape[2]) break;
      store_pair<wide>(out_k + column, grad_k[j][2 * r] * scale, grad_k[j][2 * r + 1] * scale);
      store_pair<wide>(out_v + column, grad_v[j][2 * r], grad_v[j][2 * r + 1]);
    }
  }
}

template <class T>
constexpr int shared_bytes(int columns) {
  return 4 * tile_bytes<T>(tile_rows<T>, columns) + tile_bytes<T>(block_rows<T>, tile_rows<T>) +
         2 * tile_rows<T> * static_cast<int>(sizeof(float));
}
static_assert(shared_bytes<float>(128) <= most_shared_bytes && shared_bytes<bf16>(128) <= most_shared_bytes);

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(attention_backward, hrmcore::AttentionBackward) {
  using namespace hrmcore::cuda;
  if (const char* reason = refusal(args)) return reason;
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.grad_q, &args.grad_k, &args.grad_v});
  return with_tiles(args.q, wide, [&](auto element, auto columns, auto wideness) {
    using T = decltype(element);
    const LaunchShape queries{grid_for<T>(args.q, args.prefix), block_threads<T>, shared_bytes<T>(columns())};
    const char* error = launch(backward_queries<T, columns(), wideness()>, queries, args, stream);
    if (error != nullptr) return error;
    const LaunchShape keys{grid_for<T>(args.k, args.prefix), block_threads<T>, shared_bytes<T>(columns())};
    return launch(backward_keys<T, columns(), wideness()>, keys, args, stream);
  });
}
