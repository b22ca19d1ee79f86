// The phases of a decode step, each for every block of the grid. Between two of them all of the grid must have
// passed a barrier.
#pragma once

#include "decode/bringing.cuh"

namespace hrmcore::cuda {

// Where a block stands among the tiles of a phase: of the head, or of one before it, whose code is not the head's.
template <class P, bool of_head>
struct Consumer {
  const P& params;
  const SharedLayout& layout;
  SchedulePoint at;
  int tile;  // the block's next

  __device__ __forceinline__ bool in(Phase phase) const {
    return (phase == Phase::head) == of_head && (of_head || at.phase == phase);
  }
  __device__ __forceinline__ bool enters() const { return in(Phase::gqkv) && at.layer == 0; }
  __device__ __forceinline__ bool adds_to_stream() const { return in(Phase::o) || in(Phase::down); }
};

// A finished pair of sums: rows `row` and `row` + 8 of a tile, of one request.
struct Sums {
  int tile, row, request;
  float low, high;
};
// What their finishing reads, on its way while they are added up: the stream before, or a cosine and a sine.
struct Ahead {
  float low = 0, high = 0;
};

// A row of a tile of gqkv: of which of gate, q, k, v, and which channel of all and of its head. Its pair is d / 2 after.
struct HeadRow {
  int kind, channel, i;

  template <class P>
  __device__ __forceinline__ HeadRow(const P& params, int tile, int row) {
    const int tiles_shift = params.head_shift - 4, head_of_all = tile >> tiles_shift, heads = params.heads;
    kind = (head_of_all >= heads) + (head_of_all >= 2 * heads) + (head_of_all >= 3 * heads);
    i = (tile & ((1 << tiles_shift) - 1)) * 8 + row;
    channel = (head_of_all - kind * heads) * params.head_dim + i;
  }
  __device__ __forceinline__ bool rotates() const { return kind == 1 || kind == 2; }
};

// A pair of outputs i and i + d / 2 of one head, of one of gate, q, k, v. With more than 8 requests the finisher has
// their cosine and sine, which would fill a stage of the ring.
template <class P, bool of_head>
__device__ __forceinline__ void finish_gqkv(const Consumer<P, of_head>& block, const Sums& sums,
                                            const Ahead& ahead) {
  const P& params = block.params;
  const HeadRow head_row(params, sums.tile, sums.row);
  const int d = params.head_dim, width = params.attention_width(), kind = head_row.kind,
            channel = head_row.channel, partner = channel + d / 2;
  float low = sums.low, high = sums.high;
  if (head_row.rotates()) {
    float cosine = ahead.low, sine = ahead.high;
    if constexpr (P::column_groups == 1) {
      const SharedArray<float> angles = shared_array<float>(static_cast<std::size_t>(block.layout.angles));
      cosine = angles[sums.request * d + head_row.i];
      sine = angles[sums.request * d + head_row.i + d / 2];
    }
    const float before = low;
    low = low * cosine - high * sine;
    high = high * cosine + before * sine;
  }
  if constexpr (P::int8_cache) {
    if (kind >= 2) {  // the attention, which has all of a head, rounds and appends
      float* fresh = params.fresh + ((kind - 2) * max_batch + sums.request) * width;
      store<1>(fresh + channel, Floats<1>{{low}});
      store<1>(fresh + partner, Floats<1>{{high}});
      return;
    }
  } else if (kind >= 2) {
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
  using Half = std::conditional_t<P::int8_cache, f16, bf16>;
  Half* const first = static_cast<Half*>(params.q) + 2 * (row + channel) - channel % 2;
  const float scale = params.query_scale * query_unit<P>, scaled[2] = {low * scale, high * scale};
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // the partner is d / 2 channels on
    store<1>(first + half * d, Floats<1>{{scaled[half]}});
    store<1>(first + half * d + 2, Floats<1>{{scaled[half] - rounded<Half>(scaled[half])}});
  }
}

template <Packing packing, class P, bool of_head>
__device__ __forceinline__ void finish_gate_up(const Consumer<P, of_head>& block, const Sums& sums) {
  const int place = sums.tile / 2 * block.params.rows() + sums.request;
  store_activation<packing>(block.params.hidden, place * 16 + sums.tile % 2 * 8 + sums.row,
                            sums.low * sums.high * quick_reciprocal(1.0f + quick_exp(-sums.low)));
}

template <class P, bool of_head>
__device__ __forceinline__ void finish_head(const Consumer<P, of_head>& block, const Sums& sums) {
  const int token = sums.tile * tile_rows + sums.row, vocabulary = block.params.vocabulary;
  float* logits = block.params.logits + static_cast<std::int64_t>(sums.request) * vocabulary + token;
  if (token < vocabulary) store<1>(logits, Floats<1>{{sums.low}});
  if (token + 8 < vocabulary) store<1>(logits + 8, Floats<1>{{sums.high}});
}

// A tile's partial sums of 8 requests.
__device__ __forceinline__ SharedArray<float> partials_of(const SharedLayout& layout, int slot) {
  return shared_array<float>(static_cast<std::size_t>(layout.partials)) + slot * tile_partials;
}

// The pair of the block's tiles that a thread finishes. A slot of partial sums is a tile's, of those that the block
// multiplies between two barriers, and of 8 of the requests. Warp w takes of slot w % 4 the requests 4 (w / 4) to 3
// more: lane 4i + c rows i and i + 8 of the one numbered c. Of a single request lane i of warp w < 4 does.
struct Finisher {
  int tile, row, request;
  bool mine;
  Ahead ahead;

  template <class P, bool of_head>
  __device__ __forceinline__ Finisher(const Consumer<P, of_head>& block)
      : tile(block.tile + slot() / P::column_groups * static_cast<int>(gridDim.x)),
        row(P::single ? lane_id() % 8 : lane_id() / 4),
        request(P::single ? 0
                          : slot() % P::column_groups * product_columns + lane_id() % 4 +
                                warp_id() / partial_slots * 4),
        mine(P::single ? static_cast<int>(threadIdx.x) < 32 * partial_slots && lane_id() < 8
                       : request < block.params.batch) {
    const P& params = block.params;
    if (!mine || tile >= params.shape(block.at.phase).tiles) return;
    if (block.adds_to_stream()) {
      const float* stream = params.streams[block.at.visit % 2] + (tile * params.rows() + request) * 16 + row;
      ahead = {load_one(stream), load_one(stream + 8)};
    } else if (P::column_groups > 1 && block.in(Phase::gqkv)) {
      const HeadRow head_row(params, tile, row);
      const std::int64_t position = HRMCORE_REQUEST_STATE(int, position)[request];
      const float* angles = params.rope + position * params.head_dim + head_row.i;
      if (head_row.rotates()) ahead = {load_one(angles), load_one(angles + params.head_dim / 2)};
    }
  }
  __device__ __forceinline__ static int slot() { return warp_id() % partial_slots; }
};

// The stream's pair of rows of a request grows; what the next GEMM reads is written beside it, and its squares.
template <Packing packing, class P, bool of_head>
__device__ __forceinline__ void finish_stream(const Consumer<P, of_head>& block, const Sums& sums,
                                              const Finisher& finisher) {
  const P& params = block.params;
  const int place = sums.tile * params.rows() + sums.request, at = place * 16 + sums.row;
  float square = 0;
  if (finisher.mine) {
    const float low = finisher.ahead.low + sums.low, high = finisher.ahead.high + sums.high;
    float* stream = params.streams[block.at.visit % 2] + at;
    store<1>(stream, Floats<1>{{low}});
    store<1>(stream + 8, Floats<1>{{high}});
    store_activation<packing>(params.x, at, low);
    store_activation<packing>(params.x, at + 8, high);
    const float low_read = read_back<packing>(low), high_read = read_back<packing>(high);
    square = low_read * low_read + high_read * high_read;
  }
  constexpr int rows_apart = P::single ? 1 : 4;  // lanes
#pragma unroll
  for (int by = rows_apart; by < 8 * rows_apart; by *= 2) square += __shfl_xor_sync(0xffffffffu, square, by);
  if (finisher.mine && sums.row == 0) store<1>(params.squares + place, Floats<1>{{square}});
}

// Adds up the warps' partial sums of the tiles that the block has multiplied, and hands them to the phase.
template <Packing packing, class P, bool of_head>
__device__ __forceinline__ void finish_tiles(const Consumer<P, of_head>& block, const Finisher& finisher,
                                             int tiles_done) {
  if (Finisher::slot() / P::column_groups >= tiles_done) return;
  if (P::single && warp_id() >= partial_slots) return;
  // What follows from these is computed here, for one phase, and not ahead of the loop for all of them.
  Sums sums{finisher.tile, opaque(finisher.row), opaque(finisher.request), 0, 0};
  const SharedArray<float> partials = partials_of(block.layout, Finisher::slot());
  if constexpr (P::single) {  // each row by a lane of its own
    sums.low = sum_of_warps(partials + lane_id() % tile_rows * decode_warps);
    sums.high = __shfl_xor_sync(0xffffffffu, sums.low, 8);
  } else {
    const int own =
        sums.row * product_columns + (P::column_groups > 1 ? sums.request % product_columns : sums.request);
#pragma unroll
    for (int warp = 0; warp < decode_warps; ++warp) {
      const int first = warp * tile_rows * product_columns + own;
      sums.low += partials[first];
      sums.high += partials[first + 8 * product_columns];
    }
  }
  if (block.adds_to_stream()) {
    finish_stream<packing>(block, sums, finisher);
    return;
  }
  if (!finisher.mine) return;
  const float r = inverse_rms_of(block.params, sums.request);
  sums.low *= r;
  sums.high *= r;
  if (block.in(Phase::gqkv)) {
    finish_gqkv(block, sums, finisher.ahead);
  } else if (block.in(Phase::gate_up)) {
    finish_gate_up<packing>(block, sums);
  } else {
    finish_head(block, sums);
  }
}

// This warp's partial sums of a tile, of 8 requests: (warps, rows, 8), or of a single one (rows, warps).
template <class P>
__device__ __forceinline__ void put_partials(const P&, const SharedLayout& layout, int slot,
                                             const float (&sum)[4]) {
  if constexpr (P::single) {
    if (lane_id() % 4 != 0) return;
    const SharedArray<float> rows = partials_of(layout, slot) + (lane_id() / 4 * decode_warps + warp_id());
    rows[0] = sum[0];
    rows[8 * decode_warps] = sum[2];
    return;
  }
  const SharedArray<float> partials = partials_of(layout, slot) + warp_id() * tile_rows * product_columns;
  const SharedArray<Packed<float, 2>> pairs{reinterpret_cast<Packed<float, 2>*>(partials.data)};
  pairs[lane_id()] = Packed<float, 2>{{sum[0], sum[1]}};
  pairs[lane_id() + 32] = Packed<float, 2>{{sum[2], sum[3]}};
}

// A warp's share of a matrix and of the activations.
//
// Those of a single request are brought to shared memory before they are multiplied. Those of more take the second-level
// cache about as long as the products take: where a kernel streams they come straight to registers beside the products
// of a tile, and into shared memory as well where other tiles of the block need them and there is room. A visit is
// entered in shared memory, and splits of the attention are joined there: of as many stages as there is room for, which
// are multiplied before the next ones are joined. Kernels for cards with little shared memory do not stream.
template <Packing packing, class P, bool of_head>
struct WarpWork {
  using Block = Consumer<P, of_head>;
  static constexpr bool parts = P::streaming && !of_head;
  static constexpr int item_columns = ItemOf<packing>::columns,
                       stage_columns = stage_items<packing> * item_columns;
  WarpShare share;
  Activations x;
  int stages, held;  // of a tile, and those of them whose activations have room
  bool in_place;     // all of them are there, for this tile and the next
  ActivationStream<packing, P::column_groups, P::any_shape> stream;

  __device__ __forceinline__ WarpWork(const Block& block, const MatrixShape& shape)
      : share(warp_share(shape, item_columns)), stages(shape.stages), held(shape.stages), in_place(false) {
    int columns = shape.warp_items * item_columns;
    if constexpr (parts) {
      if (columns > block.layout.held_columns) held = block.layout.held_columns / stage_columns;
      columns = block.layout.held_columns;
    }
    x = {block.layout.activations + warp_id() * columns * block.params.rows() * static_cast<int>(bf16_bytes),
         block.params.batch};
  }

  __device__ __forceinline__ static bool joins_splits(const Block& block) {
    return block.in(Phase::o) && block.params.splits_apart;
  }
  __device__ __forceinline__ static bool streams(const Block& block) {
    return P::streaming && !block.enters() && !joins_splits(block);
  }
  __device__ __forceinline__ static const void* rows_of(const Block& block) {
    const P& params = block.params;
    return block.in(Phase::down) ? params.hidden : block.in(Phase::o) ? params.attended : params.x;
  }

  // Begins the stream of a tile. `more`: the block has others of this phase.
  __device__ __forceinline__ void begin(const Block& block, bool more) {
    stream.begin(rows_of(block), share.first_sixteen, share.sixteens, x, more && held >= stages);
  }

  // Brings a part of the share. `meanwhile` runs once beside, where nothing is joined.
  template <class Meanwhile>
  __device__ __forceinline__ void bring(const Block& block, const WarpShare& part,
                                        const Meanwhile& meanwhile) {
    if (joins_splits(block)) {
      bring_attended<packing>(block.params, part, x);
    } else if constexpr (!P::streaming) {
      bring_rows<packing>(block.params, part, rows_of(block), x, meanwhile);
    }
    fill_up<packing>(block.params, part, x);
  }

  // The share's part from a stage on.
  __device__ __forceinline__ WarpShare part(int stage) const {
    constexpr int sixteens = stage_columns / 16;
    return {share.first_sixteen + stage * sixteens, min(held * sixteens, share.sixteens - stage * sixteens),
            min(held * stage_items<packing>, share.items - stage * stage_items<packing>)};
  }
};

// The squares of a norm, of this warp's columns.
template <class P>
__device__ __forceinline__ void add_squares(const P& params, const WarpShare& share) {
  float squares[P::column_groups];
  squares_of_tiles(squares, params, 0, share.first_sixteen, share.sixteens);
#pragma unroll
  for (int group = 0; group < P::column_groups; ++group) {
    put_squares(params, squares[group], group * product_columns);
  }
}

// This warp's part of one of the block's tiles; `more`: it has others of this phase.
template <Packing packing, class Stages, class P, bool of_head>
__device__ __forceinline__ void multiply_tile(const Consumer<P, of_head>& block, Stages& loader,
                                              WarpWork<packing, P, of_head>& work, int done, bool more) {
  TileSums<packing, P::column_groups> sums;
  using Reader = ActivationReader<P::column_groups, P::streaming>;
  if (P::streaming && !work.in_place && work.streams(block)) {
    work.begin(block, more);
    if (!block.adds_to_stream()) add_squares(block.params, work.share);  // once: x is in place from here on
    multiply_stages<packing, P::single>(sums, loader, work.stages, work.share.items, work.stream);
    work.in_place = work.held >= work.stages;
  } else if constexpr (work.parts) {
    int stage = 0;
#pragma unroll 1
    do {
      if (!work.in_place) {
        __syncwarp();  // other lanes have multiplied with the part before
        work.bring(block, work.part(stage), [] {});
      }
      Reader x(work.x);
      multiply_stages<packing, P::single>(sums, loader, min(work.held, work.stages - stage),
                                          work.share.items - stage * stage_items<packing>, x);
      stage += work.held;
    } while (stage < work.stages);
    work.in_place = work.held >= work.stages;
  } else {
    Reader x(work.x);
    multiply_stages<packing, P::single>(sums, loader, work.stages, work.share.items, x);
  }
#pragma unroll
  for (int eight = 0; eight < P::column_groups; ++eight) {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = sums.all(eight, i);
    put_partials(block.params, block.layout, done * P::column_groups + eight, sum);
  }
}

// What a phase begins with: its activations on their way or in place, but for those that its tiles bring in parts, and
// the squares of a norm.
template <Packing packing, class P, bool of_head>
__device__ __forceinline__ void begin_activations(const Consumer<P, of_head>& block,
                                                  WarpWork<packing, P, of_head>& work) {
  const P& params = block.params;
  const WarpShare& share = work.share;
  if (block.enters()) {
#pragma unroll 1
    for (int eight = 0; eight < P::column_groups * product_columns; eight += product_columns) {
      enter_visit<packing>(params, block.at, share, work.x, eight);
    }
    fill_up<packing>(params, share, work.x);
    work.in_place = true;
  } else if constexpr (!P::streaming) {
    work.bring(block, share, [&] {
      if (!block.adds_to_stream()) add_squares(params, share);
    });
  }
}

// A phase that multiplies. Leaves the block's first tile of the next one in `block.tile`.
template <Packing packing, class Stages, class P, bool of_head>
__device__ __forceinline__ void multiply_phase(Consumer<P, of_head>& block, Stages& loader) {
  const P& params = block.params;
  const MatrixShape& shape = params.shape(block.at.phase);
  if (block.tile < shape.tiles || block.enters()) {
    const int grid = static_cast<int>(gridDim.x);
    WarpWork<packing, P, of_head> work(block, shape);
    begin_activations<packing>(block, work);
    while (block.tile < shape.tiles) {
      const Finisher finisher(block);
      int done = 0;
#pragma unroll 1
      for (; done < block.layout.tiles_together && block.tile + done * grid < shape.tiles; ++done) {
        multiply_tile(block, loader, work, done, block.tile + (done + 1) * grid < shape.tiles);
      }
      __syncthreads();
      finish_tiles<packing>(block, finisher, done);
      block.tile += done * grid;
      if (block.tile < shape.tiles) __syncthreads();
    }
  }
  block.tile -= shape.tiles;
}

}  // namespace hrmcore::cuda
