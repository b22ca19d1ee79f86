// What the attention kernels share: sequences and what their rows see, tiles in shared memory, xPos, and, for
// those of float32, the product of a warp's 16 rows with a tile (bfloat16: attention_mma.cuh).
//
// xPos decays channel c of a score by exp(log_decay_c * distance). A block's own rows are decayed by their
// distance to the edge of the block that faces the rows it visits, and those by the rest, so no factor grows
// with the length. Within the block itself the edge may stand the wrong way round: factors reach
// exp(-log_decay * 63), 1.17 at scale base 512. Keys before a query and keys after it need different edges,
// so they are visited one side after the other, and tiles that hold both are visited twice.
//
// A warp owns 16 rows. What it accumulates lies in registers as mma.sync leaves it: with g = lane / 4 and h =
// lane % 4, c[j][0..1] are row g, columns 8j + 2h and the next, c[j][2..3] are row g + 8. bfloat16 goes
// through the tensor cores; float32 through fused multiply-adds in the same places, exact to float32.
#pragma once

#include "core/cuda.cuh"
#include "ops/attention.h"

namespace hrmcore::cuda {

// Rows of one block (16 a warp) and of the tiles that it visits: what fits 99 KB at head_dim 128.
template <class T>
constexpr int warps = sizeof(T) == 2 ? 4 : 2;
template <class T>
constexpr int block_rows = 16 * warps<T>;
template <class T>
constexpr int block_threads = 32 * warps<T>;
// The blocks that a multiprocessor must have registers for. Left to itself, ptxas spills to make room for one
// more.
constexpr int resident_blocks = 2;
// A row of a tile is 16 bytes longer than its columns: rows start in different banks.
template <class T>
HRMCORE_HOST_DEVICE constexpr int row_length(int columns) {
  return columns + 16 / static_cast<int>(sizeof(T));
}
template <class T>
HRMCORE_HOST_DEVICE constexpr int tile_bytes(int rows, int columns) {
  return rows * row_length<T>(columns) * static_cast<int>(sizeof(T));
}
constexpr int most_shared_bytes = 99 << 10;

constexpr float minus_infinity = -__builtin_inff();

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// Which of a query's keys: every one, those not after it, or those after it.
enum class Side { all, before, after };

struct Span {
  int begin, end;
};

// One sequence: its rows in the packed tensors, and the keys that each query sees on a side: from low up to
// high.
struct Sequence {
  int index;      // -1: the block has nothing to do
  int first_row;  // of the block, counted from the sequence's first
  int queries, keys, first_query, first_key, prefix, window;

  __device__ int position(int query) const { return keys - queries + query; }
  __device__ int high(int query, Side side) const {
    const int p = position(query), most = side == Side::before ? p + 1 : max(prefix, p + 1);
    const int border = window == 0 ? most : min(most, (p / window + 2) * window);
    return min(border, keys);
  }
  __device__ int low(int query, Side side) const {
    const int p = position(query);
    const int border = window == 0 || p < window ? 0 : (p / window - 1) * window;
    return side == Side::after ? max(border, p + 1) : border;
  }
  // The keys that a block of queries visits: from a multiple of `tile` on.
  __device__ Span keys_of_block(int rows, Side side, int tile) const {
    return {low(first_row, side) / tile * tile, high(first_row + rows - 1, side)};
  }
  // The queries that see any of the keys from `key` up to `last_key` on that side of them.
  __device__ Span queries_of_keys(int key, int last_key, Side side) const {
    const int earliest = position(0);
    Span span{0, queries};
    if (key >= prefix || side == Side::before) span.begin = max(key - earliest, 0);
    if (side == Side::after) span.end = min(span.end, last_key - earliest);
    if (window > 0) {
      span.begin = max(span.begin, (key / window - 1) * window - earliest);
      span.end = min(span.end, (last_key / window + 2) * window - earliest);
    }
    return span;
  }
  __device__ Span queries_of_block(int rows, Side side) const {
    return queries_of_keys(first_row, first_row + rows - 1, side);
  }
};

// Without log_decay a block visits all of its keys or queries at once, otherwise one side after the other.
__device__ __forceinline__ int count_of_sides(bool xpos, bool any_after) { return xpos && any_after ? 2 : 1; }
__device__ __forceinline__ Side side_of_visit(bool xpos, int visit) {
  return visit == 1 ? Side::after : xpos ? Side::before : Side::all;
}

__device__ __forceinline__ int clamped_offset(const TensorView& offsets, int s, std::int64_t rows) {
  const std::int64_t value = load_one(offsets.as<std::int32_t>() + s);
  return static_cast<int>(value < 0 ? 0 : value < rows ? value : rows);
}

// The block's place: tiles of block_rows counted through the sequences, over queries or over keys. Offsets
// are not read on the host, so they are clamped here to the rows that exist.
template <class T, class Args>
__device__ __forceinline__ Sequence sequence_of_block(const Args& args, bool over_keys) {
  const TensorView& offsets = over_keys ? args.key_offsets : args.offsets;
  const std::int64_t rows = over_keys ? args.k.shape[0] : args.q.shape[0];
  int block = static_cast<int>(blockIdx.x), begin = clamped_offset(offsets, 0, rows);
  for (int s = 0; s < args.prefix.shape[0]; ++s) {
    const int end = clamped_offset(offsets, s + 1, rows);
    const int tiles = (max(end - begin, 0) + block_rows<T> - 1) / block_rows<T>;
    if (block < tiles) {
      Sequence found;
      found.index = s;
      found.first_row = block * block_rows<T>;
      found.first_query = clamped_offset(args.offsets, s, args.q.shape[0]);
      found.first_key = clamped_offset(args.key_offsets, s, args.k.shape[0]);
      found.queries = max(clamped_offset(args.offsets, s + 1, args.q.shape[0]) - found.first_query, 0);
      found.keys = max(clamped_offset(args.key_offsets, s + 1, args.k.shape[0]) - found.first_key, 0);
      found.prefix = load_one(args.prefix.template as<std::int32_t>() + s);
      found.window = static_cast<int>(args.window);
      return found;
    }
    block -= tiles;
    begin = end;
  }
  return {-1, 0, 0, 0, 0, 0, 0, 0};
}

// Row `row` of the packed tensor, in the block's head.
template <class T>
__device__ __forceinline__ T* head_row(const TensorView& tensor, std::int64_t row) {
  return tensor.as<T>() + row * tensor.strides[0] + blockIdx.y * tensor.strides[1];
}

// Starts loading block_rows rows of a head from `first` on; what lies past `count` of them or past the head's
// columns becomes zeros. Where rows are not made of aligned 16-byte pieces the copy is an ordinary one.
template <class T, int columns, bool wide>
__device__ __forceinline__ void load_tile(SharedArray<T> tile, const TensorView& tensor, std::int64_t first,
                                          int count) {
  constexpr int length = row_length<T>(columns), piece = wide ? widest<T> : 1;
  const int head_dim = static_cast<int>(tensor.shape[2]);
  for (int i = static_cast<int>(threadIdx.x); i < block_rows<T> * (columns / piece); i += block_threads<T>) {
    const int row = i / (columns / piece), column = i % (columns / piece) * piece;
    const bool inside = row < count && column < head_dim;
    const T* source = inside ? head_row<T>(tensor, first + row) + column : tensor.as<T>();
    if constexpr (wide) {
      copy_async((tile + (row * length + column)).data, source, inside ? 16 : 0);
    } else {
      tile[row * length + column] = inside ? load_one(source) : T{};
    }
  }
}

// Where a block's own rows meet those that it visits, and in which direction it looks: 1 for rows behind its
// own, -1 for rows before them.
struct Edge {
  int position, direction;

  // Of a row of the block to the edge; of a visited row it is the negative. Where the row stands beyond the
  // edge it is below zero.
  __device__ int distance(int row) const { return direction * (position - row); }
};

__device__ __forceinline__ Edge edge_of_block(int first, int rows, int direction) {
  return {direction > 0 ? first + rows - 1 : first, direction};
}

// What is too small to count beside anything else is zero, as on the CPU.
__device__ __forceinline__ float decay_over(float rate, int distance) {
  const float exponent = rate * static_cast<float>(distance);
  return exponent < -64.0f ? 0.0f : expf(exponent);
}

__device__ __forceinline__ float log_decay_of(const TensorView& log_decay, int channel) {
  return load_one(log_decay.as<float>() + channel * log_decay.strides[0]);
}

// Decays a tile whose rows start at position `first`, the block's own or visited ones. For all threads of the
// block, between barriers.
template <class T, int columns>
__device__ __forceinline__ void decay_tile(SharedArray<T> tile, const TensorView& log_decay, int first,
                                           Edge edge, bool own) {
  constexpr int length = row_length<T>(columns), together = 8;  // rows that follow each other by one factor
  const int half = static_cast<int>(log_decay.shape[0]);
  for (int i = static_cast<int>(threadIdx.x); i < block_rows<T> / together * (columns / 2);
       i += block_threads<T>) {
    const int channel = i % (columns / 2), row = i / (columns / 2) * together;
    if (channel >= half) continue;
    const float rate = log_decay_of(log_decay, channel);
    const int distance = edge.distance(first + row);
    float factor = decay_over(rate, own ? distance : -distance);
    const float change = expf(rate * static_cast<float>(own ? -edge.direction : edge.direction));
#pragma unroll
    for (int r = 0; r < together; ++r) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int at = (row + r) * length + channel + part * half;
        T element = tile[at];
        assign(element, to_float(element) * factor);
        tile[at] = element;
      }
      factor *= change;
    }
  }
}

// Accumulators of the block's own rows times the decay of theirs; `back` undoes it.
template <int columns>
__device__ __forceinline__ void decay_fragments(float (&c)[columns / 8][4], const TensorView& log_decay,
                                                int first, Edge edge, bool back) {
  const int half = static_cast<int>(log_decay.shape[0]);
  const int row = first + 16 * warp_id() + lane_id() / 4;
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * j + lane_id() % 4 * 2 + i % 2;
      if (column >= 2 * half) break;
      const int distance = edge.distance(row + i / 2 * 8);
      c[j][i] *= decay_over(log_decay_of(log_decay, column < half ? column : column - half),
                            back ? -distance : distance);
    }
  }
}

// c (16 x n) += A B: A is 16 rows of `depth`, B a tile stored by its columns (n rows of depth) or, with
// `rows_are_depth`, by its rows (depth rows of n).
template <int n, int depth, bool rows_are_depth, int a_length, int b_length>
__device__ __forceinline__ void multiply(float (&c)[n / 8][4], SharedArray<float> a, SharedArray<float> b) {
  const int g = lane_id() / 4, h = lane_id() % 4;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    const float upper = a[g * a_length + k], lower = a[(g + 8) * a_length + k];
#pragma unroll
    for (int j = 0; j < n / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + 2 * h + i;
        const float right = b[rows_are_depth ? k * b_length + column : column * b_length + k];
        c[j][i] += upper * right;
        c[j][2 + i] += lower * right;
      }
    }
  }
}

// Accumulators into a row-major tile of the warp's 16 rows, for the next GEMM.
template <class T, int n, int length>
__device__ __forceinline__ void store_fragments(SharedArray<T> rows, const float (&c)[n / 8][4]) {
  const int g = lane_id() / 4, h = lane_id() % 4;
#pragma unroll
  for (int j = 0; j < n / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T element;
      assign(element, c[j][i]);
      rows[(g + i / 2 * 8) * length + 8 * j + 2 * h + i % 2] = element;
    }
  }
}

// Two neighbouring columns of a row in global memory.
template <bool wide, class T>
__device__ __forceinline__ Floats<2> load_pair(const T* p) {
  if constexpr (wide) return load<2>(p);
  return {{load<1>(p)[0], load<1>(p + 1)[0]}};
}

template <bool wide, class T>
__device__ __forceinline__ void store_pair(T* p, float first, float second) {
  if constexpr (wide) {
    store<2>(p, {{first, second}});
  } else {
    store<1>(p, {{first}});
    store<1>(p + 1, {{second}});
  }
}

// The sum, or the largest, of the four lanes that hold a row.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class Args>
const char* unsupported_reason(const Args& args) {
  if (args.q.shape[2] > 128) return "head_dim (last axis of q) must be at most 128 on CUDA";
  return nullptr;
}

// f(the constant number of columns that holds head_dim, whether accesses are 16 bytes wide).
template <class F>
const char* with_tiles(const TensorView& q, bool wide, const F& f) {
  const auto with_width = [&](auto wideness) {
    const std::int64_t d = q.shape[2];
    if (d <= 32) return f(std::integral_constant<int, 32>(), wideness);
    if (d <= 64) return f(std::integral_constant<int, 64>(), wideness);
    return f(std::integral_constant<int, 128>(), wideness);
  };
  return wide ? with_width(std::true_type()) : with_width(std::false_type());
}

// Enough blocks for every tile of every sequence, over queries or keys; some find nothing to do.
template <class T>
dim3 grid_for(const TensorView& rows, const TensorView& prefix) {
  const std::int64_t tiles = rows.shape[0] == 0 ? 0 : rows.shape[0] / block_rows<T> + prefix.shape[0];
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(rows.shape[1]));
}

}  // namespace hrmcore::cuda
