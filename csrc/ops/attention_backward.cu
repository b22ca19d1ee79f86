#include "ops/attention_tiles.cuh"

// Three kernels, so that nothing is added up through memory: one owns a tile of queries and sums grad_q over
// the keys, two own a tile of keys and sum grad_k or grad_v over the queries that see them; both sums in one
// kernel would take more registers at head_dim 128 than a thread has. All compute the weights again from lse.
// The gate's derivative is taken where the gradient of the output is read: those of keys do that again for
// every tile, from the cache, which costs it no memory of the caller's. Under xPos grad_q and grad_k are sums
// over decayed rows until a side is through.

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
__device__ __forceinline__ void store_sums(const TensorView& tensor, std::int64_t first_row, int rows,
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
  store_sums<wide, T>(args.grad_q, first_row, rows, grad_q, scale);
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
    store_sums<wide, float>(args.grad_k, first_row, rows, sums, scale);
  } else {
    store_sums<wide, float>(args.grad_v, first_row, rows, sums, 1.0f);
  }
}

template <class T>
constexpr int shared_bytes(int columns) {
  return 4 * tile_bytes<T>(block_rows<T>, columns) + tile_bytes<T>(block_rows<T>, block_rows<T>) +
         2 * block_rows<T> * static_cast<int>(sizeof(float));
}
static_assert(shared_bytes<float>(128) <= most_shared_bytes && shared_bytes<bf16>(128) <= most_shared_bytes);

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(attention_backward, hrmcore::AttentionBackward) {
  using namespace hrmcore::cuda;
  if (const char* reason = unsupported_reason(args)) return reason;
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.grad_q, &args.grad_k, &args.grad_v});
  return with_tiles(args.q, wide, [&](auto element, auto columns, auto wideness) {
    using T = decltype(element);
    constexpr int threads = block_threads<T>, width = columns();
    const LaunchShape queries{grid_for<T>(args.q, args.prefix), threads, shared_bytes<T>(width)};
    const LaunchShape keys{grid_for<T>(args.k, args.prefix), threads, shared_bytes<T>(width)};
    const char* error = launch(backward_queries<T, width, wideness()>, queries, args, stream);
    if (error == nullptr) error = launch(backward_keys<T, width, wideness(), Of::keys>, keys, args, stream);
    if (error == nullptr) error = launch(backward_keys<T, width, wideness(), Of::values>, keys, args, stream);
    return error;
  });
}
