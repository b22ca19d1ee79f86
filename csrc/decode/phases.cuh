// The phases of a decode step, each for every block of the grid. Between two of them all of the grid must have
// passed a barrier.
#pragma once

#include "decode/attention.cuh"
#include "decode/gemm.cuh"

namespace hrmcore::cuda {

// Where a block stands among the tiles of a phase.
template <class P>
struct Consumer {
  const P& params;
  const SharedLayout& layout;
  SchedulePoint at;
  int tile;  // the block's next
};

// A warp's share of a matrix's columns: 16s of them from `first_sixteen` on, and the items that they lie in.
struct WarpShare {
  int first_sixteen, sixteens, items;
};
__device__ __forceinline__ WarpShare warp_share(const MatrixShape& shape, int item_columns) {
  const int first_item = warp_id() * shape.warp_items, first_sixteen = first_item * (item_columns / 16);
  return {first_sixteen, min(shape.warp_items * (item_columns / 16), shape.sixteens - first_sixteen),
          min(shape.warp_items, shape.items - first_item)};
}

// Sums of squares: lane r and each eighth lane after it add up those of request r; warp sums meet in the end.
__device__ __forceinline__ void put_squares(float square) {
  square += __shfl_xor_sync(0xffffffffu, square, 8);
  square += __shfl_xor_sync(0xffffffffu, square, 16);
  if (lane_id() < max_batch)
    HRMCORE_REQUEST_STATE(float, squares)[warp_id() * max_batch + lane_id()] = square;
}
template <class P>
__device__ __forceinline__ float inverse_rms(const P& params, float squares) {
  return quick_reciprocal_root(squares * params.inverse_width + params.eps);
}
// Of a request's row, once the block has passed a barrier after put_squares.
template <class P>
__device__ __forceinline__ float inverse_rms_of(const P& params, int request) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) {
    sum += HRMCORE_REQUEST_STATE(float, squares)[warp * max_batch + request];
  }
  return inverse_rms(params, sum);
}

// The squares of `count` tiles from `first` on that the phase before has left, (D / 16, B): lane 8i + r adds
// those of request r of every fourth tile.
template <class P>
__device__ __forceinline__ float squares_of_tiles(const P& params, int first, int count) {
  const int request = lane_id() % max_batch;
  float sum = 0;
  constexpr int together = 4, turn = 32 / max_batch;
#pragma unroll 1
  for (int tile = request < params.batch ? lane_id() / max_batch : count; tile < count;
       tile += together * turn) {
    float squares[together];  // read at once, and then added
#pragma unroll
    for (int i = 0; i < together; ++i) {
      squares[i] = 0;
      if (tile + i * turn < count)
        squares[i] = load_one(params.squares + (first + tile + i * turn) * params.batch + request);
    }
#pragma unroll
    for (int i = 0; i < together; ++i) sum += squares[i];
  }
  return sum;
}

// Copies this warp's share of rows in their order from global memory. `meanwhile` runs once, when the first are on
// their way: what it reads itself is not waited for after them.
template <Packing packing, class Meanwhile, class P>
__device__ __forceinline__ void bring_rows(const P& params, const WarpShare& share, const void* rows,
                                           const Activations& x, const Meanwhile& meanwhile) {
  const ActivationPiece<packing>* from =
      static_cast<const ActivationPiece<packing>*>(rows) + share.first_sixteen * params.batch * 2;
  const SharedArray<ActivationPiece<packing>> to = x.pieces<packing>();
  const int count = share.sixteens * params.batch * 2;
  constexpr int together = 8;
  bool begun = false;
#pragma unroll 1
  for (int first = lane_id(); !begun || first < count; first += 32 * together) {
    ActivationPiece<packing> pieces[together];
    const int left = count - first + lane_id();  // of the warp
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (32 * i >= left) break;
      if (first + 32 * i < count) pieces[i] = load_packed<8>(&from[first + 32 * i].at[0]);
    }
    if (!begun) meanwhile();
    begun = true;
#pragma unroll
    for (int i = 0; i < together; ++i) {
      if (32 * i >= left) break;
      if (first + 32 * i < count) to[first + 32 * i] = pieces[i];
    }
  }
}

// The same of what the attention has left, its splits joined.
template <Packing packing, class P>
__device__ __forceinline__ void bring_attended(const P& params, const WarpShare& share,
                                               const Activations& x) {
  const SharedArray<ActivationPiece<packing>> to = x.pieces<packing>();
  const int count = share.sixteens * params.batch * 2;
#pragma unroll 1
  for (int piece = lane_id(); piece < count; piece += 32) {
    const int row = piece / 2,
              sixteen = params.batch == 1 ? row
                                          : static_cast<int>(std::uint64_t{params.inverse_batch} *
                                                                 static_cast<std::uint32_t>(row) >>
                                                             32),
              request = row - sixteen * params.batch;
    const int channel = 16 * (share.first_sixteen + sixteen) + 8 * (piece % 2);
    to[piece] = attended_channels<packing>(params, request, channel);
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
  float r;  // 1 / rms of this lane's request, where there is a visit before

  __device__ __forceinline__ Entrance(const P& params_, const SchedulePoint& at_)
      : params(params_), at(at_), r(0) {
    if (at.visit == 0) return;
    float square = squares_of_tiles(params, 0, params.width / 16);
    square += __shfl_xor_sync(0xffffffffu, square, 8);
    square += __shfl_xor_sync(0xffffffffu, square, 16);
    r = inverse_rms(params, square);
  }

  __device__ __forceinline__ bool after_h() const { return at.visit > 0 && at.l == 0; }
  __device__ __forceinline__ float* changed() const { return params.states[after_h() ? 1 : 0]; }
  __device__ __forceinline__ float* kept() const { return params.states[after_h() ? 0 : 1]; }

  __device__ __forceinline__ Entered channels(int request, int sixteen, int half) const {
    const int k = 16 * sixteen + 8 * half, place = (sixteen * params.batch + request) * 16 + 8 * half;
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

// Lane 8i + r serves request r, so that no lane asks which request it has.
template <Packing packing, class P>
__device__ __forceinline__ void enter_visit(const P& params, const SchedulePoint& at, const WarpShare& share,
                                            const Activations& x) {
  const Entrance entrance(params, at);
  const int request = lane_id() % max_batch, turn = 32 / max_batch;
  const SharedArray<ActivationPiece<packing>> to = x.pieces<packing>();
  float square = 0;
  if (request < params.batch) {
#pragma unroll 2
    for (int i = lane_id() / max_batch; i < 2 * share.sixteens; i += turn) {
      const Entered entered = entrance.channels(request, share.first_sixteen + i / 2, i % 2);
      ActivationPiece<packing> eight;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        eight.at[c] = to_activation<packing>(entered.u[c]);
        square += entered.u[c] * entered.u[c];
      }
      to[(i / 2 * params.batch + request) * 2 + i % 2] = eight;
    }
#pragma unroll 1
    for (int tile = static_cast<int>(blockIdx.x); tile < share.first_sixteen + share.sixteens;
         tile += static_cast<int>(gridDim.x)) {
      const int half = lane_id() / max_batch;
      if (tile < share.first_sixteen || half > 1) continue;
      const Entered entered = entrance.channels(request, tile, half);
      const int place = (tile * params.batch + request) * 16 + 8 * half;
      store<8>(params.streams[at.visit % 2] + place, entered.u);
      store<8>(entrance.changed() + place, entered.state);
      if (at.visit == 0) store<8>(entrance.kept() + place, entered.other);
    }
  }
  put_squares(square);
}

// A finished pair of sums: rows `row` and `row` + 8 of a tile, of one request.
struct Sums {
  int tile, row, request;
  float low, high;
};

// A pair of outputs i and i + d / 2 of one head, of one of gate, q, k, v.
template <class P>
__device__ __forceinline__ void finish_gqkv(const Consumer<P>& block, const Sums& sums) {
  const P& params = block.params;
  const int d = params.head_dim, width = params.attention_width(), tiles_shift = params.head_shift - 4;
  const int head_of_all = sums.tile >> tiles_shift, heads = params.heads;
  const int kind = (head_of_all >= heads) + (head_of_all >= 2 * heads) + (head_of_all >= 3 * heads);
  const int i = (sums.tile & ((1 << tiles_shift) - 1)) * 8 + sums.row,
            channel = (head_of_all - kind * heads) * d + i, partner = channel + d / 2;
  float low = sums.low, high = sums.high;
  if (kind == 1 || kind == 2) {
    const SharedArray<float> angles = shared_array<float>(static_cast<std::size_t>(block.layout.angles));
    const float cosine = angles[sums.request * d + i], sine = angles[sums.request * d + i + d / 2];
    const float before = low;
    low = low * cosine - high * sine;
    high = high * cosine + before * sine;
  }
  if (kind >= 2) {
    bf16* cached = cache_of(params, block.at.slot, kind - 2) +
                   HRMCORE_REQUEST_STATE(std::int64_t, slot_mapping)[sums.request] * width;
    store<1>(cached + channel, Floats<1>{{low}});
    store<1>(cached + partner, Floats<1>{{high}});
    return;
  }
  const int row = sums.request * width;
  if (kind == 0) {
    store<1>(params.gate + row + channel, Floats<1>{{low}});
    store<1>(params.gate + row + partner, Floats<1>{{high}});
    return;
  }
  bf16 *const first = static_cast<bf16*>(params.q) + row, *const second = first + max_batch * width;
  const float scale = quick_reciprocal_root(static_cast<float>(d)), scaled[2] = {low * scale, high * scale};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = half == 0 ? channel : partner;
    store<1>(first + at, Floats<1>{{scaled[half]}});
    store<1>(second + at, Floats<1>{{scaled[half] - rounded<bf16>(scaled[half])}});
  }
}

template <Packing packing, class P>
__device__ __forceinline__ void finish_gate_up(const Consumer<P>& block, const Sums& sums) {
  const int place = sums.tile / 2 * block.params.batch + sums.request;
  store_activation<packing>(block.params.hidden, place * 16 + sums.tile % 2 * 8 + sums.row,
                            sums.low * sums.high * quick_reciprocal(1.0f + quick_exp(-sums.low)));
}

template <class P>
__device__ __forceinline__ void finish_head(const Consumer<P>& block, const Sums& sums) {
  const int token = sums.tile * tile_rows + sums.row, vocabulary = block.params.vocabulary;
  float* logits = block.params.logits + static_cast<std::int64_t>(sums.request) * vocabulary + token;
  if (token < vocabulary) store<1>(logits, Floats<1>{{sums.low}});
  if (token + 8 < vocabulary) store<1>(logits + 8, Floats<1>{{sums.high}});
}

__device__ __forceinline__ SharedArray<float> partials_of(const SharedLayout& layout, int tile) {
  return shared_array<float>(static_cast<std::size_t>(layout.partials)) + tile * tile_partials;
}

// The pair of the block's tiles that a thread finishes. Warp w takes requests 4 (w / 4) to 3 more of tile w % 4
// of those that the block multiplies between two barriers: lane 4i + c rows i and i + 8 of the one numbered c.
struct Finisher {
  int tile, row, request;
  bool mine;
  float low_before, high_before;  // of the stream, where the phase adds to it

  template <class P>
  __device__ __forceinline__ Finisher(const Consumer<P>& block, bool to_stream)
      : tile(block.tile + warp_id() % max_tiles_together * static_cast<int>(gridDim.x)),
        row(lane_id() / 4),
        request(lane_id() % 4 + warp_id() / 4 * 4),
        mine(request < block.params.batch),
        low_before(0),
        high_before(0) {
    if (mine && to_stream && tile < block.params.shape(block.at.phase).tiles) {
      const float* stream =
          block.params.streams[block.at.visit % 2] + (tile * block.params.batch + request) * 16 + row;
      low_before = load_one(stream);
      high_before = load_one(stream + 8);
    }
  }
};

// The stream's pair of rows of a request grows; what the next GEMM reads is written beside it, and its squares.
template <Packing packing, class P>
__device__ __forceinline__ void finish_stream(const Consumer<P>& block, const Sums& sums,
                                              const Finisher& finisher) {
  const P& params = block.params;
  const int place = sums.tile * params.batch + sums.request, at = place * 16 + sums.row;
  float square = 0;
  if (finisher.mine) {
    const float low = finisher.low_before + sums.low, high = finisher.high_before + sums.high;
    float* stream = params.streams[block.at.visit % 2] + at;
    store<1>(stream, Floats<1>{{low}});
    store<1>(stream + 8, Floats<1>{{high}});
    store_activation<packing>(params.x, at, low);
    store_activation<packing>(params.x, at + 8, high);
    const float low_read = read_back<packing>(low), high_read = read_back<packing>(high);
    square = low_read * low_read + high_read * high_read;
  }
#pragma unroll
  for (int by = 4; by < 32; by *= 2) square += __shfl_xor_sync(0xffffffffu, square, by);
  if (finisher.mine && sums.row == 0) store<1>(params.squares + place, Floats<1>{{square}});
}

// Adds up the warps' partial sums of the tiles that the block has multiplied, and hands them to the phase.
template <Packing packing, class P>
__device__ __forceinline__ void finish_tiles(const Consumer<P>& block, const Finisher& finisher,
                                             bool to_stream, int tiles_done) {
  const int own = warp_id() % max_tiles_together;
  if (own >= tiles_done) return;
  // What follows from these is computed here, for one phase, and not ahead of the loop for all of them.
  Sums sums{finisher.tile, opaque(finisher.row), opaque(finisher.request), 0, 0};
  const SharedArray<float> partials = partials_of(block.layout, own);
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) {
    const int first = (warp * tile_rows + sums.row) * max_batch + sums.request;
    sums.low += partials[first];
    sums.high += partials[first + 8 * max_batch];
  }
  if (to_stream) {
    finish_stream<packing>(block, sums, finisher);
    return;
  }
  if (!finisher.mine) return;
  const float r = inverse_rms_of(block.params, sums.request);
  sums.low *= r;
  sums.high *= r;
  if (block.at.phase == Phase::gqkv) {
    finish_gqkv(block, sums);
  } else if (block.at.phase == Phase::gate_up) {
    finish_gate_up<packing>(block, sums);
  } else {
    finish_head(block, sums);
  }
}

// Brings what a phase multiplies with, this warp's share of it; zeros where an item is wider than the matrix.
template <Packing packing, class P>
__device__ __forceinline__ void bring_activations(const Consumer<P>& block, const WarpShare& share,
                                                  const Activations& x) {
  const P& params = block.params;
  if (block.at.phase == Phase::o && params.splits_apart) {
    bring_attended<packing>(params, share, x);
  } else if (block.at.phase == Phase::o || block.at.phase == Phase::down) {
    bring_rows<packing>(params, share, block.at.phase == Phase::o ? params.attended : params.hidden, x,
                        [] {});
  } else if (block.at.phase == Phase::gqkv && block.at.layer == 0) {
    enter_visit<packing>(params, block.at, share, x);
  } else {
    bring_rows<packing>(params, share, params.x, x,
                        [&] { put_squares(squares_of_tiles(params, share.first_sixteen, share.sixteens)); });
  }
  const int end = share.items * (ItemOf<packing>::columns / 16) * params.batch * 2;
  for (int piece = max(share.sixteens, 0) * params.batch * 2 + lane_id(); piece < end; piece += 32) {
    x.pieces<packing>()[piece] = ActivationPiece<packing>{};
  }
  __syncwarp();
}

// This warp's partial sums of a tile.
__device__ __forceinline__ void put_partials(const SharedLayout& layout, int tile, const float (&sum)[4]) {
  const SharedArray<float> partials = partials_of(layout, tile) + warp_id() * tile_rows * max_batch;
  const SharedArray<Packed<float, 2>> pairs{reinterpret_cast<Packed<float, 2>*>(partials.data)};
  pairs[lane_id()] = Packed<float, 2>{{sum[0], sum[1]}};
  pairs[lane_id() + 32] = Packed<float, 2>{{sum[2], sum[3]}};
}

// A phase that multiplies. Leaves the block's first tile of the next one in `block.tile`.
template <Packing packing, class Stages, class P>
__device__ __forceinline__ void multiply_phase(Consumer<P>& block, Stages& loader) {
  constexpr int item_columns = ItemOf<packing>::columns;
  const P& params = block.params;
  const MatrixShape& shape = params.shape(block.at.phase);
  const bool enters = block.at.phase == Phase::gqkv && block.at.layer == 0,
             to_stream = block.at.phase == Phase::o || block.at.phase == Phase::down;
  if (block.tile < shape.tiles || enters) {
    const WarpShare share = warp_share(shape, item_columns);
    const Activations x{block.layout.activations + warp_id() * shape.warp_items * item_columns *
                                                       params.batch * static_cast<int>(bf16_bytes),
                        params.batch};
    bring_activations<packing>(block, share, x);
    const int grid = static_cast<int>(gridDim.x);
    while (block.tile < shape.tiles) {
      const Finisher finisher(block, to_stream);
      int done = 0;
#pragma unroll 1
      for (; done < block.layout.tiles_together && block.tile + done * grid < shape.tiles; ++done) {
        float sum[4];
        multiply_tile<packing>(sum, loader, shape.stages, share.items, x);
        put_partials(block.layout, done, sum);
      }
      __syncthreads();
      finish_tiles<packing>(block, finisher, to_stream, done);
      block.tile += done * grid;
      if (block.tile < shape.tiles) __syncthreads();
    }
  }
  block.tile -= shape.tiles;
}

}  // namespace hrmcore::cuda
