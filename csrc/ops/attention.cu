#include "ops/attention.h"

#include "ops/attention_tiles.cuh"

// A block holds a tile of queries of one head and visits the keys in tiles, the next one loading while this
// one is multiplied; online softmax in registers; the gate is applied on the way out. Weights are rounded to
// the inputs' dtype for the second GEMM, as the tensor cores take them; under xPos so are decayed queries
// and keys. Keys and values are read once for each tile of queries.

namespace hrmcore::cuda {
namespace {

// Scores become exp(score - row_max) with the running row_max; returns what earlier sums must be multiplied
// by, for two rows.
template <int n>
__device__ __forceinline__ void update_softmax(float (&s)[n / 8][4], float (&row_max)[2], float (&row_sum)[2],
                                               float (&rescale)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float highest = row_max[r];
#pragma unroll
    for (int j = 0; j < n / 8; ++j) highest = fmaxf(highest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    highest = max_of_row(highest);
    const float base = highest == minus_infinity ? 0.0f : highest;  // a row that has seen nothing yet
    rescale[r] = expf(row_max[r] - base);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[j][i] = expf(s[j][i] - base);
        sum += s[j][i];
      }
    }
    row_sum[r] = row_sum[r] * rescale[r] + sum;
    row_max[r] = highest;
  }
}

template <class T, int columns, bool wide>
__global__ void __launch_bounds__(block_threads<T>, resident_blocks) forward(AttentionForward args) {
  constexpr int tile = block_rows<T>, length = row_length<T>(columns), weights_length = row_length<T>(tile);
  const Sequence sequence = sequence_of_block<T>(args, false);
  if (sequence.index < 0) return;
  const SharedArray<T> q = shared_array<T>(0), keys = q + tile * length, values = keys + 2 * tile * length;
  const SharedArray<T> weights = values + 2 * tile * length + warp_id() * 16 * weights_length;
  const int g = lane_id() / 4, h = lane_id() % 4;
  const int first = sequence.first_row + 16 * warp_id();  // of this warp
  const int rows = min(sequence.queries - sequence.first_row, block_rows<T>);
  const int position = sequence.position(sequence.first_row);
  const float scale = 1.0f / sqrtf(static_cast<float>(args.q.shape[2]));
  const bool xpos = args.log_decay.given();

  const auto load_keys = [&](int key, int stage) {
    const std::int64_t row = sequence.first_key + key;
    load_tile<T, columns, wide>(keys + stage * tile * length, args.k, row, sequence.keys - key);
    load_tile<T, columns, wide>(values + stage * tile * length, args.v, row, sequence.keys - key);
    commit_copies();
  };

  float o[columns / 8][4] = {}, row_max[2] = {minus_infinity, minus_infinity}, row_sum[2] = {}, rescale[2];
  const int sides = count_of_sides(xpos, sequence.prefix > position + 1);
#pragma unroll 1
  for (int visit = 0; visit < sides; ++visit) {
    const Side side = side_of_visit(xpos, visit);
    const Span span = sequence.keys_of_block(rows, side, tile);
    const Edge edge = edge_of_block(position, block_rows<T>, side == Side::after ? 1 : -1);
    load_tile<T, columns, wide>(q, args.q, sequence.first_query + sequence.first_row, rows);
    load_keys(span.begin, 0);
#pragma unroll 1
    for (int key = span.begin, stage = 0; key < span.end; key += tile, stage ^= 1) {
      if (key + tile < span.end) {
        load_keys(key + tile, stage ^ 1);
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
      __syncthreads();
      if (xpos) {
        if (key == span.begin) decay_tile<T, columns>(q, args.log_decay, position, edge, true);
        decay_tile<T, columns>(keys + stage * tile * length, args.log_decay, key, edge, false);
        __syncthreads();
      }
      float s[tile / 8][4] = {};
      multiply<tile, columns, false, length, length>(s, q + warp_id() * 16 * length,
                                                     keys + stage * tile * length);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int query = min(first + g + 8 * r, sequence.queries - 1);
        const int low = sequence.low(query, side) - key, high = sequence.high(query, side) - key;
#pragma unroll
        for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = 8 * j + 2 * h + i;
            float& score = s[j][2 * r + i];
            score = column >= low && column < high ? score * scale : minus_infinity;
          }
        }
      }
      update_softmax<tile>(s, row_max, row_sum, rescale);
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[j][i] *= rescale[i / 2];
      }
      store_fragments<T, tile, weights_length>(weights, s);
      __syncwarp();
      multiply<columns, tile, true, weights_length, length>(o, weights, values + stage * tile * length);
      __syncthreads();
    }
    wait_for_copies<0>();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = sum_of_row(row_sum[r]);
    const int query = first + g + 8 * r;
    if (query >= sequence.queries) continue;
    const std::int64_t row = sequence.first_query + query;
    const T* gate = head_row<T>(args.gate, row);
    T* out = head_row<T>(args.out, row);
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      const int column = 8 * j + 2 * h;
      if (column >= args.q.shape[2]) break;
      const Floats<2> open = load_pair<wide>(gate + column);
      store_pair<wide>(out + column, sigmoid(open[0]) * (o[j][2 * r] / sum),
                       sigmoid(open[1]) * (o[j][2 * r + 1] / sum));
    }
    if (h == 0)
      store<1>(args.lse.as<float>() + row * args.lse.strides[0] + blockIdx.y, {{row_max[r] + logf(sum)}});
  }
}

template <class T>
constexpr int shared_bytes(int columns) {
  return 5 * tile_bytes<T>(block_rows<T>, columns) + tile_bytes<T>(block_rows<T>, block_rows<T>);
}
static_assert(shared_bytes<float>(128) <= most_shared_bytes && shared_bytes<bf16>(128) <= most_shared_bytes);

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(attention_forward, hrmcore::AttentionForward) {
  using namespace hrmcore::cuda;
  if (const char* reason = unsupported_reason(args)) return reason;
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.gate, &args.out});
  return with_tiles(args.q, wide, [&](auto element, auto columns, auto wideness) {
    using T = decltype(element);
    const LaunchShape shape{grid_for<T>(args.q, args.prefix), block_threads<T>, shared_bytes<T>(columns())};
    return launch(forward<T, columns(), wideness()>, shape, args, stream);
  });
}
