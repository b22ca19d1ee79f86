// What the bfloat16 attention kernels share: a block of 4 warps owns 64 rows, 16 a warp, and visits tiles of 64.
//
// Sums and weights lie in registers as mma.sync leaves them (attention_tiles.cuh). Two such 16 x 8 pieces side by
// side, packed to bfloat16, are the A operand of the next product: weights never go through memory. Results leave
// through shared memory, so that every access to global memory is 16 bytes wide.
#pragma once

#include "ops/attention_table.cuh"

namespace hrmcore::cuda {

constexpr int tile = static_cast<int>(tile_rows);
static_assert(tile == block_rows<bf16>);
constexpr int mma_threads = block_threads<bf16>;

constexpr float log2_e = 1.44269504f, log_2 = 0.693147181f;

// f(the constant number of columns that holds head_dim, whether rows are made of 16-byte pieces, whether xPos).
template <class F>
const char* with_columns(const TensorView& q, bool wide, bool xpos, const F& f) {
  const auto with_form = [&](auto columns, auto wideness) {
    return xpos ? f(columns, wideness, std::true_type()) : f(columns, wideness, std::false_type());
  };
  if (!wide) return with_form(std::integral_constant<int, 128>(), std::false_type());
  if (q.shape[2] > 64) return with_form(std::integral_constant<int, 128>(), std::true_type());
  return with_form(std::integral_constant<int, 64>(), std::true_type());
}

// A block for each line of a table.
inline dim3 grid_of_table(const TensorView& rows, const TensorView& prefix) {
  return dim3(static_cast<unsigned>(lines_of_table(rows.shape[0], prefix.shape[0])),
              static_cast<unsigned>(rows.shape[1]));
}

// ---- loading

// The rows of a head one tile after the other: a thread keeps its column and its place in memory.
template <int columns, bool wide>
class RowLoader {
  static constexpr int pieces = columns / widest<bf16>, together = mma_threads / pieces;

 public:
  __device__ __forceinline__ RowLoader(const TensorView& tensor, std::int64_t first)
      : tensor_(tensor), next_(head_row<bf16>(tensor, first)) {
    if (wide) next_ += own_row() * tensor.strides[0] + own_column();
  }

  // Starts loading the next 64 rows; what lies past `rows` of them, and past head_dim, becomes zeros.
  __device__ __forceinline__ void load(SharedArray<bf16> to, int rows) {
    constexpr int length = row_length<bf16>(columns);
    const int head_dim = static_cast<int>(tensor_.shape[2]);
    if constexpr (wide) {
      const int left = own_column() < head_dim ? rows - own_row() : 0;
      to = to + (own_row() * length + own_column());
#pragma unroll
      for (int row = 0; row < tile; row += together) {
        copy_async((to + row * length).data, next_, row < left ? 16 : 0);
        next_ += together * tensor_.strides[0];
      }
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < tile * columns; i += mma_threads) {
        const int row = i / columns, column = i % columns;
        const bool inside = row < rows && column < head_dim;
        to[row * length + column] = inside ? load_one(next_ + row * tensor_.strides[0] + column) : bf16{};
      }
      next_ += tile * tensor_.strides[0];
    }
  }

 private:
  __device__ __forceinline__ static int own_row() { return static_cast<int>(threadIdx.x) / pieces; }
  __device__ __forceinline__ static int own_column() {
    return static_cast<int>(threadIdx.x) % pieces * widest<bf16>;
  }

  const TensorView& tensor_;
  const bf16* next_;
};

// ---- products

// A fragment of the warp's 16 rows: columns k to k + 15.
template <int columns>
__device__ __forceinline__ void load_fragment(std::uint32_t (&a)[4], SharedArray<bf16> rows, int k) {
  ldmatrix<false>(a, (rows + (lane_id() % 16 * row_length<bf16>(columns) + k + lane_id() / 16 * 8)).data);
}

template <int columns>
__device__ __forceinline__ void load_fragments(std::uint32_t (&a)[columns / 16][4], SharedArray<bf16> rows) {
#pragma unroll
  for (int k = 0; k < columns / 16; ++k) load_fragment<columns>(a[k], rows, 16 * k);
}

template <int columns>
__device__ __forceinline__ void multiply_fragment(float (&c)[tile / 8][4], const std::uint32_t (&a)[4],
                                                  SharedArray<bf16> b, int k) {
  constexpr int length = row_length<bf16>(columns);
  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < tile / 8; j += 2) {
    std::uint32_t right[4];
    ldmatrix<false>(right, (b + ((8 * j + lane / 16 * 8 + lane % 8) * length + k + lane / 8 % 2 * 8)).data);
    mma_bf16(c[j], a, {right[0], right[1]});
    mma_bf16(c[j + 1], a, {right[2], right[3]});
  }
}

// c (16 x 64) += A B^T, A in registers.
template <int columns>
__device__ __forceinline__ void multiply_transposed(float (&c)[tile / 8][4],
                                                    const std::uint32_t (&a)[columns / 16][4],
                                                    SharedArray<bf16> b) {
#pragma unroll
  for (int k = 0; k < columns / 16; ++k) multiply_fragment<columns>(c, a[k], b, 16 * k);
}

// The same, A the warp's rows of a tile, `ahead` steps unrolled: more fetches fragments into more registers.
template <int columns, int ahead>
__device__ __forceinline__ void multiply_transposed(float (&c)[tile / 8][4], SharedArray<bf16> a,
                                                    SharedArray<bf16> b) {
#pragma unroll ahead
  for (int k = 0; k < columns; k += 16) {
    std::uint32_t left[4];
    load_fragment<columns>(left, a, k);
    multiply_fragment<columns>(c, left, b, k);
  }
}

// c (16 x columns) += A B, A 16 x 64 in registers.
template <int columns>
__device__ __forceinline__ void multiply_rows(float (&c)[columns / 8][4],
                                              const std::uint32_t (&a)[tile / 16][4], SharedArray<bf16> b) {
  constexpr int length = row_length<bf16>(columns);
  const int lane = lane_id();
#pragma unroll
  for (int k = 0; k < tile / 16; ++k) {
#pragma unroll
    for (int j = 0; j < columns / 8; j += 2) {
      std::uint32_t right[4];
      ldmatrix<true>(right, (b + ((16 * k + lane % 16) * length + 8 * j + lane / 16 * 8)).data);
      mma_bf16(c[j], a[k], {right[0], right[1]});
      mma_bf16(c[j + 1], a[k], {right[2], right[3]});
    }
  }
}

// 16 x 64 numbers as a product leaves them, rounded, as the next one takes them.
__device__ __forceinline__ void pack_fragments(std::uint32_t (&a)[tile / 16][4],
                                               const float (&c)[tile / 8][4]) {
#pragma unroll
  for (int k = 0; k < tile / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&piece)[4] = c[2 * k + i / 2];
      a[k][i] = to_bf16x2(piece[i % 2 * 2], piece[i % 2 * 2 + 1]);
    }
  }
}

// ---- masks

// Minus infinity in place of the scores outside of what a thread's two rows see of a tile that starts at `first`.
__device__ __forceinline__ void hide_unseen(float (&s)[tile / 8][4], const Span (&seen)[2], int first) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int low = seen[r].begin - first - lane_id() % 4 * 2;
    const auto count = static_cast<unsigned>(max(seen[r].end - seen[r].begin, 0));
#pragma unroll
    for (int j = 0; j < tile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (static_cast<unsigned>(8 * j + i - low) >= count) s[j][2 * r + i] = minus_infinity;
      }
    }
  }
}

// ---- results

template <int columns>
constexpr int sums_length = columns + 8;  // rows of float32 start in different banks
template <int columns>
constexpr int sums_bytes = 4 * tile * sums_length<columns>;

// The warp's rows of a sum, each times its factor, in shared memory that nobody else uses any more.
template <int columns>
__device__ __forceinline__ SharedArray<float> lay_out(const float (&sums)[columns / 8][4],
                                                      const float (&factor)[2]) {
  constexpr int length = sums_length<columns>;
  const SharedArray<float> own = shared_array<float>(0) + 16 * warp_id() * length;
  __syncwarp();  // what it was used for before
#pragma unroll
  for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = (lane_id() / 4 + 8 * r) * length + 8 * j + lane_id() % 4 * 2;
      store_shared<2>(own + at,
                      Packed<float, 2>{{sums[j][2 * r] * factor[r], sums[j][2 * r + 1] * factor[r]}});
    }
  }
  __syncwarp();
  return own;
}

template <int piece>
__device__ __forceinline__ Floats<piece> piece_at(SharedArray<float> at) {
  Floats<piece> numbers;
  if constexpr (piece == 1) {
    numbers[0] = at[0];
  } else {
#pragma unroll
    for (int half = 0; half < piece; half += 4) {
      const Packed<float, 4> four = load_shared<4>(at + half);
#pragma unroll
      for (int n = 0; n < 4; ++n) numbers[half + n] = four.at[n];
    }
  }
  return numbers;
}

// The warp's rows of a sum, each times its factor: calls f(row of the warp, column, Floats of neighbouring
// columns) for what lies within `rows` and head_dim.
template <int columns, bool wide, class F>
__device__ __forceinline__ void for_each_piece(const float (&sums)[columns / 8][4], const float (&factor)[2],
                                               int rows, int head_dim, const F& f) {
  constexpr int piece = wide ? widest<bf16> : 1;
  const SharedArray<float> own = lay_out<columns>(sums, factor);
#pragma unroll 2
  for (int i = lane_id(); i < 16 * columns / piece; i += 32) {
    const int row = i / (columns / piece), column = i % (columns / piece) * piece;
    if (row >= rows || column >= head_dim) continue;
    f(row, column, piece_at<piece>(own + (row * sums_length<columns> + column)));
  }
}

// The same, stored as rows of a packed tensor of elements E.
template <int columns, bool wide, class E>
__device__ __forceinline__ void store_sums(const TensorView& tensor, std::int64_t first_row, int rows,
                                           const float (&sums)[columns / 8][4], float factor) {
  constexpr int piece = wide ? widest<bf16> : 1;
  const int own = 16 * warp_id();
  for_each_piece<columns, wide>(sums, {factor, factor}, rows - own, static_cast<int>(tensor.shape[2]),
                                [&](int row, int column, const Floats<piece>& numbers) {
                                  store<piece>(head_row<E>(tensor, first_row + own + row) + column, numbers);
                                });
}

// The rows of `sums` turned back by the angles of their positions (ops/rope.h), as rows of a packed tensor of
// bfloat16; `piece` divides head_dim / 2. A position outside of the table gives a row of NaNs.
template <int columns, int piece>
__device__ __forceinline__ void store_turned_back(const TensorView& tensor, std::int64_t first_row, int rows,
                                                  SharedArray<float> sums, const TensorView& table,
                                                  const TensorView& positions) {
  const int half = static_cast<int>(tensor.shape[2] / 2);
#pragma unroll 1
  for (int i = lane_id(); i < 8 * columns / piece; i += 32) {
    const int row = i / (columns / 2 / piece), column = i % (columns / 2 / piece) * piece;
    if (row >= rows || column >= half) continue;
    const std::int32_t position =
        load_one(positions.as<std::int32_t>() + (first_row + row) * positions.strides[0]);
    const bool inside = position >= 0 && position < table.shape[0];
    const float* cosine = table.as<float>() + (inside ? position : 0) * table.strides[0] + column;
    const SharedArray<float> at = sums + (row * sums_length<columns> + column);
    const Floats<piece> low = piece_at<piece>(at), high = piece_at<piece>(at + half);
    const Floats<piece> cos = load<piece>(cosine), sin = load<piece>(cosine + half);
    Floats<piece> low_out, high_out;
#pragma unroll
    for (int n = 0; n < piece; ++n) {
      const float s = inside ? sin[n] : __uint_as_float(0x7fc00000u);
      low_out[n] = low[n] * cos[n] + high[n] * s;
      high_out[n] = high[n] * cos[n] - low[n] * s;
    }
    bf16* out = head_row<bf16>(tensor, first_row + row) + column;
    store<piece>(out, low_out);
    store<piece>(out + half, high_out);
  }
}

// Sums over rows that the rotation has turned, as the gradient of rows before it where there is one.
template <int columns, bool wide>
__device__ __forceinline__ void store_gradient(const TensorView& tensor, std::int64_t first_row, int rows,
                                               const float (&sums)[columns / 8][4], float factor,
                                               const TensorView& table, const TensorView& positions) {
  if (!table.given()) {
    store_sums<columns, wide, bf16>(tensor, first_row, rows, sums, factor);
    return;
  }
  const SharedArray<float> own = lay_out<columns>(sums, {factor, factor});
  const int skipped = 16 * warp_id();
  if (wide && tensor.shape[2] % (2 * widest<bf16>) == 0) {
    store_turned_back<columns, widest<bf16>>(tensor, first_row + skipped, rows - skipped, own, table,
                                             positions);
  } else {
    store_turned_back<columns, 1>(tensor, first_row + skipped, rows - skipped, own, table, positions);
  }
}

__device__ __forceinline__ float quick_sigmoid(float x) { return quick_reciprocal(1.0f + quick_exp(-x)); }

}  // namespace hrmcore::cuda
