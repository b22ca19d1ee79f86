#include "ops/attention.h"

#include "ops/attention_mma.cuh"

// A block holds a tile of queries of one head and visits the keys in tiles, the next one loading while this
// one is multiplied; online softmax in registers; the gate is applied on the way out. Keys and values are read
// once for each tile of queries. In bfloat16 weights are rounded for the second product, as the tensor cores
// take them, and under xPos decayed queries and keys.

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
static_assert(shared_bytes<float>(128) <= most_shared_bytes);

// ---- bfloat16

// The online softmax of a thread's two rows: sums of weights, and of weights times values, both of the weights
// 2^(score - base), scores in units of log 2.
template <int columns>
struct Attended {
  float sums[columns / 8][4] = {};
  float base[2] = {lowest_base, lowest_base}, total[2] = {};

  // Finite, so that a row that has seen nothing yet needs no case of its own: its weights are 2^-infinity.
  static constexpr float lowest_base = -3e38f;
  // Weights may be so many powers of two above 1 before the base follows the highest score: the sums are in
  // float32, and bfloat16 is as exact there. So few tiles but the first rescale what was summed.
  static constexpr float slack = 8;

  // Turns raw scores into weights; `scale` comes with 1 / log 2 in it.
  __device__ __forceinline__ void weigh(float (&s)[tile / 8][4], float scale) {
    float highest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = s[0][2 * r];
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) highest[r] = fmaxf(highest[r], fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      highest[r] = max_of_row(highest[r]) * scale;
    }
    const bool rises = highest[0] > base[0] + slack || highest[1] > base[1] + slack;
    if (__ballot_sync(0xffffffffu, rises) != 0) rebase(highest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          s[j][i] = quick_exp2(s[j][i] * scale - base[r]);
          total[r] += s[j][i];
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void rebase(const float (&highest)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float higher = fmaxf(base[r], highest[r]), rescale = quick_exp2(base[r] - higher);
      base[r] = higher;
      total[r] *= rescale;
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        sums[j][2 * r] *= rescale;
        sums[j][2 * r + 1] *= rescale;
      }
    }
  }
};

template <int columns, bool wide, bool xpos>
__global__ void __launch_bounds__(mma_threads, resident_blocks) forward_mma(AttentionForward args) {
  constexpr int tile_size = tile * row_length<bf16>(columns);
  const Sequence sequence =
      sequence_of_line(args.tiles.as<std::int32_t>() + blockIdx.x * line_ints, static_cast<int>(args.window));
  if (sequence.index < 0) return;
  // two stages of keys and values; the queries pass through the second on their way to registers
  const SharedArray<bf16> keys = shared_array<bf16>(0), values = keys + 2 * tile_size,
                          queries = keys + tile_size;
  const int own = 16 * warp_id(), rows = min(sequence.queries - sequence.first_row, tile);
  const int position = sequence.position(sequence.first_row);
  const std::int64_t first_row = sequence.first_query + sequence.first_row;
  const float scale = log2_e * quick_reciprocal_root(static_cast<float>(args.q.shape[2]));

  Attended<columns> attended;
  const int sides = count_of_sides(xpos, sequence.prefix > position + 1);
#pragma unroll 1
  for (int visit = 0; visit < (xpos ? sides : 1); ++visit) {
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
    wait_for_copies<1>();
    __syncthreads();
    if (xpos) {
      decay_tile<bf16, columns>(queries, args.log_decay, position, edge, true);
      __syncthreads();
    }
    std::uint32_t q[columns / 16][4];
    load_fragments<columns>(q, queries + own * row_length<bf16>(columns));

    Span seen[2];
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
      float s[tile / 8][4] = {};
      multiply_transposed<columns>(s, q, keys + stage);
      if (key < seen_by_all.begin || key + tile > seen_by_all.end) hide_unseen(s, seen, key);
      attended.weigh(s, scale);
      std::uint32_t weights[tile / 16][4];
      pack_fragments(weights, s);
      multiply_rows<columns>(attended.sums, weights, values + stage);
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = sum_of_row(attended.total[r]);
    const int row = own + lane_id() / 4 + 8 * r;
    inverse[r] = quick_reciprocal(total);
    if (lane_id() % 4 == 0 && row < rows) {
      const float lse = attended.base[r] * log_2 + quick_log(total);
      store<1>(args.lse.as<float>() + (first_row + row) * args.lse.strides[0] + blockIdx.y, {{lse}});
    }
  }
  constexpr int piece = wide ? widest<bf16> : 1;
  for_each_piece<columns, wide>(attended.sums, inverse, rows - own, static_cast<int>(args.q.shape[2]),
                                [&](int row, int column, Floats<piece> numbers) {
                                  const std::int64_t at = first_row + own + row;
                                  const Floats<piece> gate =
                                      load<piece>(head_row<bf16>(args.gate, at) + column);
#pragma unroll
                                  for (int i = 0; i < piece; ++i) numbers[i] *= quick_sigmoid(gate[i]);
                                  store<piece>(head_row<bf16>(args.out, at) + column, numbers);
                                });
}

constexpr int mma_shared_bytes(int columns) { return 4 * tile_bytes<bf16>(tile, columns); }
static_assert(mma_shared_bytes(128) <= most_shared_bytes && sums_bytes<128> <= mma_shared_bytes(128));

const char* launch_mma(const AttentionForward& args, bool wide, void* stream) {
  if (!args.tiles.given()) return "bfloat16 on CUDA needs `tiles`";
  return with_columns(args.q, wide, args.log_decay.given(), [&](auto columns, auto wideness, auto xpos) {
    const LaunchShape shape{grid_of_table(args.q, args.prefix), mma_threads, mma_shared_bytes(columns())};
    return launch(forward_mma<columns(), wideness(), xpos()>, shape, args, stream);
  });
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(attention_forward, hrmcore::AttentionForward) {
  using namespace hrmcore::cuda;
  if (const char* reason = unsupported_reason(args)) return reason;
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.gate, &args.out});
  if (args.q.dtype == hrmcore::DType::bf16) return launch_mma(args, wide, stream);
  return with_tiles(args.q, wide, [&](auto columns, auto wideness) {
    const LaunchShape shape{grid_for<float>(args.q, args.prefix), block_threads<float>,
                            shared_bytes<float>(columns())};
    return launch(forward<float, columns(), wideness()>, shape, args, stream);
  });
}
