// What a warp multiplies with, brought to shared memory: its share of a matrix's columns, of rows that the phase before
// has left, of splits joined or of a visit that is entered; and the squares of their norms.
#pragma once

#include "decode/attention.cuh"
#include "decode/gemm.cuh"

namespace hrmcore::cuda {

// A warp's share of a matrix's columns: 16s of them from `first_sixteen` on, and the items that they lie in.
struct WarpShare {
  int first_sixteen, sixteens, items;
};
__device__ __forceinline__ WarpShare warp_share(const MatrixShape& shape, int item_columns) {
  const int first_item = warp_id() * shape.warp_items, first_sixteen = first_item * (item_columns / 16);
  return {first_sixteen, min(shape.warp_items * (item_columns / 16), shape.sixteens - first_sixteen),
          min(shape.warp_items, shape.items - first_item)};
}

// Lane r and each eighth lane after it serve request r of the 8 from `eight` on.
__device__ __forceinline__ int request_of_lane(int eight) { return eight + lane_id() % product_columns; }
constexpr int lanes_of_request = 32 / product_columns;

// The sum of neighbours, one of each warp, in order.
__device__ __forceinline__ float sum_of_warps(const SharedArray<float>& first) {
  const Packed<float, 4> halves[2] = {load_shared<4>(first), load_shared<4>(first + 4)};
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) sum += halves[warp / 4].at[warp % 4];
  return sum;
}

// Sums of squares: the lanes of a request add theirs up; warp sums meet in the end.
template <class P>
__device__ __forceinline__ void put_squares(const P&, float square, int eight) {
  square += __shfl_xor_sync(0xffffffffu, square, 8);
  square += __shfl_xor_sync(0xffffffffu, square, 16);
  const SharedArray<float> sums = HRMCORE_REQUEST_STATE(float, squares);
  if (lane_id() < (P::single ? 1 : product_columns))
    sums[warp_id() * (P::single ? 1 : max_batch) + eight + lane_id()] = square;
}
template <class P>
__device__ __forceinline__ float inverse_rms(const P& params, float squares) {
  return quick_reciprocal_root(squares * params.inverse_width + params.eps);
}
// Of a request's row, once the block has passed a barrier after put_squares.
template <class P>
__device__ __forceinline__ float inverse_rms_of(const P& params, int request) {
  if constexpr (P::single) return inverse_rms(params, sum_of_warps(HRMCORE_REQUEST_STATE(float, squares)));
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) {
    sum += HRMCORE_REQUEST_STATE(float, squares)[warp * max_batch + request];
  }
  return inverse_rms(params, sum);
}

// The squares of `count` tiles from `first` on that the phase before has left, (D / 16, rows): each lane adds those of
// every fourth tile, of its request of the 8 from `eight` on and of each 8 after these.
template <int groups, class P>
__device__ __forceinline__ void squares_of_tiles(float (&sums)[groups], const P& params, int eight, int first,
                                                 int count) {
  const int request = request_of_lane(eight);
#pragma unroll
  for (float& sum : sums) sum = 0;
  constexpr int together = 4, turn = lanes_of_request;
#pragma unroll 1
  for (int tile = request < params.batch ? lane_id() / product_columns : count; tile < count;
       tile += together * turn) {
    float squares[groups][together];  // read at once, and then added
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const float* row = params.squares + (first + tile + i * turn) * params.rows() + request;
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        squares[group][i] = 0;
        if (tile + i * turn < count && (group == 0 || request + group * product_columns < params.batch))
          squares[group][i] = load_one(row + group * product_columns);
      }
    }
#pragma unroll
    for (int group = 0; group < groups; ++group) {
#pragma unroll
      for (int i = 0; i < together; ++i) sums[group] += squares[group][i];
    }
  }
}

// Copies this warp's share of rows in their order from global memory. `meanwhile` runs once, when the first are on
// their way: what it reads itself is not waited for after them. Pieces are words and their copies predicates: elements
// of 16 bits would be put together again, and a branch a piece is ten instructions.
template <Packing packing, class Meanwhile, class P>
__device__ __forceinline__ void bring_rows(const P& params, const WarpShare& share, const void* rows,
                                           const Activations& x, const Meanwhile& meanwhile) {
  using Piece = Packed<std::uint32_t, 4>;
  const Piece* from = static_cast<const Piece*>(rows) + share.first_sixteen * params.rows() * 2;
  const SharedArray<Piece> to = shared_array<Piece>(static_cast<std::size_t>(x.offset));
  const int count = share.sixteens * params.rows() * 2;
  // Any shape over an int8 cache has registers for no more than 4: with 8 it spills on sm_120.
  constexpr int of_many = P::any_shape && P::int8_cache ? 4 : 8, together = P::single ? 2 : of_many;
  bool begun = false;
#pragma unroll 1
  for (int first = lane_id(); !begun || first < count; first += 32 * together) {
    Piece pieces[together];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (first + 32 * i < count) pieces[i] = load_packed<4>(&from[first + 32 * i].at[0]);
    }
    if (!begun) meanwhile();
    begun = true;
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (first + 32 * i < count) to[first + 32 * i] = pieces[i];
    }
  }
}

// A number over the batch, rounded down.
template <class P>
__device__ __forceinline__ int divided_by_batch(const P& params, int number) {
  if (params.batch == 1) return number;
  return static_cast<int>(std::uint64_t{params.inverse_batch} * static_cast<std::uint32_t>(number) >> 32);
}

// The same of what the attention has left, its splits joined, of the requests that there are.
template <Packing packing, class P>
__device__ __forceinline__ void bring_attended(const P& params, const WarpShare& share,
                                               const Activations& x) {
  const SharedArray<ActivationPiece<packing>> to = x.pieces<packing>();
  const int count = share.sixteens * params.batch * 2;
#pragma unroll 1
  for (int piece = lane_id(); piece < count; piece += 32) {
    const int half = piece % 2, sixteen = divided_by_batch(params, piece / 2),
              request = piece / 2 - sixteen * params.batch;
    const int channel = 16 * (share.first_sixteen + sixteen) + 8 * half;
    to[(sixteen * params.rows() + request) * 2 + half] = attended_channels<packing>(params, request, channel);
  }
}

// Eight channels of a request as a visit enters them.
struct Entered {
  Floats<8> state, other, u;
};

// The stream that enters a visit: the state that the visit before left, its norm taken now (from the bfloat16
// copy, as every norm), plus the other one. Each block computes all of it; one writes each tile down.
template <class P>
struct Entrance {
  const P& params;
  SchedulePoint at;
  float r;  // 1 / rms of this lane's request of the 8 from `eight` on, where there is a visit before

  __device__ __forceinline__ Entrance(const P& params_, const SchedulePoint& at_, int eight)
      : params(params_), at(at_), r(0) {
    if (at.visit == 0) return;
    float square[1];
    squares_of_tiles(square, params, eight, 0, params.width / 16);
    square[0] += __shfl_xor_sync(0xffffffffu, square[0], 8);
    square[0] += __shfl_xor_sync(0xffffffffu, square[0], 16);
    r = inverse_rms(params, square[0]);
  }

  __device__ __forceinline__ bool after_h() const { return at.visit > 0 && at.l == 0; }
  __device__ __forceinline__ float* changed() const { return params.states[after_h() ? 1 : 0]; }
  __device__ __forceinline__ float* kept() const { return params.states[after_h() ? 0 : 1]; }

  __device__ __forceinline__ Entered channels(int request, int sixteen, int half) const {
    const int k = 16 * sixteen + 8 * half, place = (sixteen * params.rows() + request) * 16 + 8 * half;
    Entered entered;
    if (at.visit == 0) {
      const std::int64_t token = clamped(load_one(params.tokens + request), params.vocabulary);
      entered.state = load<8>(params.z_init + k);
      entered.other = load<8>(static_cast<const bf16*>(params.embedding) + token * params.width + k);
#pragma unroll
      for (int i = 0; i < 8; ++i) entered.other[i] *= params.embedding_scale;
    } else {
      entered.state = load<8>(params.streams[(at.visit + 1) % 2] + place);
      entered.other = load<8>(kept() + place);
#pragma unroll
      for (int i = 0; i < 8; ++i) entered.state[i] *= r;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) entered.u[i] = entered.state[i] + entered.other[i];
    return entered;
  }
};

// Of the 8 requests from `eight` on.
template <Packing packing, class P>
__device__ __forceinline__ void enter_visit(const P& params, const SchedulePoint& at, const WarpShare& share,
                                            const Activations& x, int eight) {
  const Entrance entrance(params, at, eight);
  const int request = request_of_lane(eight);
  const SharedArray<ActivationPiece<packing>> to = x.pieces<packing>();
  float square = 0;
  if (request < params.batch) {
#pragma unroll 2
    for (int i = lane_id() / product_columns; i < 2 * share.sixteens; i += lanes_of_request) {
      const Entered entered = entrance.channels(request, share.first_sixteen + i / 2, i % 2);
      ActivationPiece<packing> piece;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        piece.at[c] = to_activation<packing>(entered.u[c]);
        square += entered.u[c] * entered.u[c];
      }
      to[(i / 2 * params.rows() + request) * 2 + i % 2] = piece;
    }
#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.x); tile < share.first_sixteen + share.sixteens;
         tile += static_cast<int>(gridDim.x)) {
      const int half = lane_id() / product_columns;
      if (tile < share.first_sixteen || half > 1) continue;
      const Entered entered = entrance.channels(request, tile, half);
      const int place = (tile * params.rows() + request) * 16 + 8 * half;
      store<8>(params.streams[at.visit % 2] + place, entered.u);
      store<8>(entrance.changed() + place, entered.state);
      if (at.visit == 0) store<8>(entrance.kept() + place, entered.other);
    }
  }
  put_squares(params, square, eight);
}

// Zeros where an item is wider than the matrix, and the end of a warp's bringing.
template <Packing packing, class P>
__device__ __forceinline__ void fill_up(const P& params, const WarpShare& share, const Activations& x) {
  const int sixteens = share.items * (ItemOf<packing>::columns / 16), end = sixteens * params.rows() * 2;
  if (sixteens > share.sixteens) {
    for (int piece = max(share.sixteens, 0) * params.rows() * 2 + lane_id(); piece < end; piece += 32) {
      x.pieces<packing>()[piece] = ActivationPiece<packing>{};
    }
  }
  __syncwarp();
}

}  // namespace hrmcore::cuda
