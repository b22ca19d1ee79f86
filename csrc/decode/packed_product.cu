#include "decode/packed_product.h"

#include "core/cuda.cuh"
#include "decode/schedule.h"

// A block multiplies a tile of rows with a tile of tokens. Its warps own rows of their own: a weight is made bfloat16
// once a block, in the registers of the lane that the layout gives it. As in the decode step weights are the 16 rows of
// mma.sync and tokens its columns: with g = lane / 4 and h = lane % 4 a lane holds of 16 columns 4h to 4h + 3, of rows g
// and g + 8 of a tile, and of token g. So what it reads of a token is in the registers where a product takes it.
//
// Activations and weights come 64 columns at a time through a ring of stages. A stage has the activations as
// (16 columns, tokens, 16), so that the lanes of a read, and of a copy, meet different banks; then each warp's tiles.

namespace hrmcore::cuda {
namespace {

constexpr int stage_columns = 64, sixteens = stage_columns / 16;

struct ProductParams {
  const bf16* x;
  const std::byte* weights;
  void* out;
  int tokens, columns, rows, tiles;  // rows of the matrix, and their tiles of 16
  int piece_tiles;                   // tiles of a piece of paired rows; 1: rows in order
  int items, stages;
  std::int64_t tile_bytes;
  bool gated, float_out;
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// What a block does: `warps` warps of `row_tiles` x 16 rows each, and `token_count` tokens. `resident`: how many of them
// a multiprocessor must have registers for.
template <Packing packing_, int warps_, int row_tiles_, int token_count_, int stages_, int resident_>
struct Shape {
  static constexpr Packing packing = packing_;
  static constexpr int warps = warps_, row_tiles = row_tiles_, token_count = token_count_, stages = stages_;
  static constexpr int resident = resident_, threads = 32 * warps;
  static constexpr int rows = 16 * warps * row_tiles;
  static constexpr int items = stage_columns / ItemOf<packing>::columns;  // of a tile in a stage
  static constexpr int tile_bytes = items * item_bytes<packing>;
  static constexpr int activation_bytes = token_count * stage_columns * static_cast<int>(bf16_bytes);
  static constexpr int stage_bytes = activation_bytes + warps * row_tiles * tile_bytes;
  static constexpr int shared_bytes = stages * stage_bytes;
  static_assert(shared_bytes <= 99 << 10);
};

// ---- loading

// Starts the copies of a stage after the other, for one thread.
template <class S>
class StageLoader {
 public:
  __device__ __forceinline__ StageLoader(const ProductParams& params, int first_token, int first_tile)
      : params_(params),
        first_token_(first_token),
        first_tile_(first_tile + warp_id() * S::row_tiles),
        activations_(params.x + static_cast<std::int64_t>(first_token + own_token()) * params.columns +
                     own_column()),
        weights_(params.weights + first_tile_ * params.tile_bytes + 16 * lane_id()) {}

  __device__ __forceinline__ void load(int slot) {
    load_activations(slot);
    load_weights(slot + S::activation_bytes + warp_id() * S::row_tiles * S::tile_bytes);
    ++stage_;
  }

 private:
  // A warp brings 4 tokens at a time, 128 bytes of each.
  __device__ __forceinline__ static int own_token() { return 4 * warp_id() + lane_id() / 2 % 4; }
  __device__ __forceinline__ static int own_column() { return 16 * (lane_id() / 8) + 8 * (lane_id() % 2); }

  __device__ __forceinline__ void load_activations(int slot) {
    constexpr int together = 4 * S::warps;
    const int column = stage_ * stage_columns + own_column();
    const int left = column < params_.columns ? params_.tokens - first_token_ - own_token() : 0;
    const int place = slot + 32 * (lane_id() / 8 * S::token_count + own_token()) + 16 * (lane_id() % 2);
    std::uint8_t* const to = shared_array<std::uint8_t>(static_cast<std::size_t>(place)).data;
    const bf16* from = activations_ + static_cast<std::int64_t>(stage_) * stage_columns;
#pragma unroll
    for (int token = 0; token < S::token_count; token += together) {
      copy_async(to + 32 * token, from, token < left ? 16 : 0);
      from += together * params_.columns;
    }
  }

  // Items that there are none of become zeros, scales and all.
  __device__ __forceinline__ void load_weights(int slot) {
    constexpr int pieces = S::tile_bytes / 16;
    const int left = (params_.items - stage_ * S::items) * (item_bytes<S::packing> / 16) - lane_id();
    std::uint8_t* const to = shared_array<std::uint8_t>(static_cast<std::size_t>(slot + 16 * lane_id())).data;
    const std::byte* from = weights_ + static_cast<std::int64_t>(stage_) * S::tile_bytes;
#pragma unroll
    for (int tile = 0; tile < S::row_tiles; ++tile) {
      const int there = first_tile_ + tile < params_.tiles ? left : 0;
#pragma unroll
      for (int piece = 0; piece < pieces; piece += 32) {
        if (piece + 32 <= pieces || lane_id() < pieces - piece)
          copy_async(to + tile * S::tile_bytes + 16 * piece, from + 16 * piece, piece < there ? 16 : 0);
      }
      from += params_.tile_bytes;
    }
  }

  const ProductParams& params_;
  int first_token_, first_tile_, stage_ = 0;
  const bf16* activations_;
  const std::byte* weights_;
};

// ---- weights in bfloat16

// Of 16 columns of a tile: the registers of rows g and g + 8, and again of the next columns.
struct Weights {
  bf16x2 at[4];
};

constexpr bf16x2 minus_0 = 0x80008000;

// Signs and magnitudes of two, whole numbers below 128, times a scale of 2^28 times their own (mma_layout.py). Over the
// bits of 128 a magnitude m makes 128 + m. Exact but for the last product, which is rounded.
__device__ __forceinline__ bf16x2 scaled(std::uint32_t pair, bf16x2 scale) {
  constexpr bf16x2 signs = 0x80008000, all_128 = 0x43004300, by = 0x31803180;  // 2^-28
  constexpr bf16x2 minus_128_by = 0xb500b500;
  const bf16x2 raised = masked(pair, 0x807f807f, all_128);
  const bf16x2 whole = multiply_add_bf16(raised, by, (pair & signs) ^ minus_128_by);
  return multiply_add_bf16(whole, scale, minus_0);
}

// A lane's part of a tile's items of a stage.
template <Packing packing>
struct LanePiece;

template <>
struct LanePiece<Packing::int8> {
  Packed<std::uint32_t, 4> words;
  bf16x2 low = 0, high = 0;  // the scale of row g twice, and that of row g + 8

  __device__ __forceinline__ void read(int tile, int sixteen) {
    if (sixteen % 2 != 0) return;  // an item is 32 columns
    const int item = tile + sixteen / 2 * item_bytes<Packing::int8>;
    words = load_shared<4>(shared_array<std::uint32_t>(static_cast<std::size_t>(item + 16 * lane_id())));
    const bf16x2 scales =
        shared_array<bf16x2>(static_cast<std::size_t>(item + fragment_bytes))[lane_id() / 4];
    low = byte_permute(scales, 0, 0x1010);
    high = byte_permute(scales, 0, 0x3232);
  }
  __device__ __forceinline__ Weights take(int sixteen) const {
    Weights weights;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t bytes = words.at[sixteen % 2 * 2 + half];
      weights.at[half] = scaled(bytes, half == 0 ? low : high);
      weights.at[half + 2] = scaled(byte_permute(bytes, 0, 0x2301), half == 0 ? low : high);
    }
    return weights;
  }
};

template <>
struct LanePiece<Packing::int4> {
  Packed<std::uint32_t, 4> words;
  Packed<bf16x2, 2> scales;  // of each group of 32 columns, those of rows g and g + 8

  __device__ __forceinline__ void read(int tile, int sixteen) {
    if (sixteen != 0) return;  // an item is 64 columns
    words = load_shared<4>(shared_array<std::uint32_t>(static_cast<std::size_t>(tile + 16 * lane_id())));
    scales = load_shared<2>(
        shared_array<bf16x2>(static_cast<std::size_t>(tile + fragment_bytes + 8 * (lane_id() / 4))));
  }
  // A nibble n = w + 8 makes 128 + n, and of that less 136 2^-28 or 2^-24 is exact (the scales have as much too much).
  // The product with them is rounded.
  __device__ __forceinline__ Weights take(int sixteen) const {
    constexpr bf16x2 by[2] = {0x31803180, 0x33803380}, minus_136_by[2] = {0xb508b508, 0xb708b708};
    const bf16x2 pair = scales.at[sixteen / 2];
    const bf16x2 low = byte_permute(pair, 0, 0x1010), high = byte_permute(pair, 0, 0x3232);
    Weights weights;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bf16x2 raised = masked(words.at[sixteen] >> (4 * i), 0x000f000f, 0x43004300);
      const bf16x2 whole = multiply_add_bf16(raised, by[i % 2], minus_136_by[i % 2]);
      weights.at[i] = multiply_add_bf16(whole, i % 2 == 0 ? low : high, minus_0);
    }
    return weights;
  }
};

// ---- products

// A warp's sums: of each 8 tokens and 16 rows, lane 4g + h has row g of tokens 2h and 2h + 1, then row g + 8 of them.
template <class S>
struct Sums {
  float at[S::token_count / 8][S::row_tiles][4] = {};
};

template <class S>
__device__ __forceinline__ void multiply_stage(Sums<S>& sums, int slot) {
  const int own_tiles = slot + S::activation_bytes + warp_id() * S::row_tiles * S::tile_bytes;
  LanePiece<S::packing> piece[S::row_tiles];
#pragma unroll
  for (int sixteen = 0; sixteen < sixteens; ++sixteen) {
    Weights weights[S::row_tiles];
#pragma unroll
    for (int tile = 0; tile < S::row_tiles; ++tile) {
      piece[tile].read(own_tiles + tile * S::tile_bytes, sixteen);
      weights[tile] = piece[tile].take(sixteen);
    }
    const SharedArray<std::uint32_t> rows = shared_array<std::uint32_t>(
        static_cast<std::size_t>(slot + 32 * sixteen * S::token_count + 8 * lane_id()));
#pragma unroll
    for (int eight = 0; eight < S::token_count / 8; ++eight) {
      const Packed<std::uint32_t, 2> columns = load_shared<2>(rows + 64 * eight);
#pragma unroll
      for (int tile = 0; tile < S::row_tiles; ++tile)
        mma_bf16(sums.at[eight][tile], weights[tile].at, columns.at);
    }
  }
}

// ---- results

// The lane's row of two tokens becomes two rows of one: even rows take the first token, with the row after them.
struct Pair {
  float first, second;
};
__device__ __forceinline__ Pair trade(float of_first_token, float of_second) {
  const bool odd = lane_id() / 4 % 2 != 0;
  const float got = __shfl_xor_sync(0xffffffffu, odd ? of_first_token : of_second, 4);
  return odd ? Pair{got, of_second} : Pair{of_first_token, got};
}

__device__ __forceinline__ void store_pair(const ProductParams& params, int token, int column, int columns,
                                           Pair pair) {
  if (token >= params.tokens || column >= columns) return;
  const std::int64_t at = static_cast<std::int64_t>(token) * columns + column;
  if (params.float_out) {
    float* const out = static_cast<float*>(params.out) + at;
    store<1>(out, {{pair.first}});
    if (column + 1 < columns) store<1>(out + 1, {{pair.second}});
  } else {
    store<2>(static_cast<bf16*>(params.out) + at, {{pair.first, pair.second}});
  }
}

// The sums of a tile and 8 tokens. Which rows they are is told from `tile`.
__device__ __forceinline__ void store_sums(const ProductParams& params, int first_token, int tile,
                                           const float (&sums)[4]) {
  const int token = first_token + 2 * (lane_id() % 4) + lane_id() / 4 % 2, two = 2 * (lane_id() / 8);
  if (params.gated) {
    const auto gated = [&](int i) {
      return sums[i] * quick_reciprocal(1 + quick_exp(-sums[i])) * sums[i + 2];
    };
    store_pair(params, token, 8 * tile + two, params.rows / 2, trade(gated(0), gated(1)));
    return;
  }
  const int piece = tile / params.piece_tiles, half = 8 * params.piece_tiles;
  const int column = 2 * half * piece + 8 * (tile - piece * params.piece_tiles) + two;
  store_pair(params, token, column, params.rows, trade(sums[0], sums[1]));
  store_pair(params, token, column + half, params.rows, trade(sums[2], sums[3]));
}

template <class S>
__global__ void __launch_bounds__(S::threads, S::resident) multiply(ProductParams params) {
  const int first_token = static_cast<int>(blockIdx.x) * S::token_count;
  const int first_tile = static_cast<int>(blockIdx.y) * S::warps * S::row_tiles;
  StageLoader<S> loader(params, first_token, first_tile);
#pragma unroll 1
  for (int stage = 0; stage < S::stages - 1; ++stage) {
    if (stage < params.stages) loader.load(stage * S::stage_bytes);
    commit_copies();
  }
  Sums<S> sums;
  int slot = 0, next = (S::stages - 1) * S::stage_bytes;
#pragma unroll 1
  for (int stage = 0; stage < params.stages; ++stage) {
    wait_for_copies<S::stages - 2>();
    __syncthreads();  // the stage is there, and nobody reads the one before any more
    if (stage + S::stages - 1 < params.stages) loader.load(next);
    commit_copies();
    next = slot;
    multiply_stage(sums, slot);
    slot = slot + S::stage_bytes == S::shared_bytes ? 0 : slot + S::stage_bytes;
  }
#pragma unroll
  for (int tile = 0; tile < S::row_tiles; ++tile) {
    const int own = first_tile + warp_id() * S::row_tiles + tile;
    if (own >= params.tiles) break;
#pragma unroll
    for (int eight = 0; eight < S::token_count / 8; ++eight)
      store_sums(params, first_token + 8 * eight, own, sums.at[eight][tile]);
  }
}

// ---- which blocks

// What a shape costs: the busiest multiprocessor's products, or what all blocks ask of the second-level cache, in
// seconds of an H200. Only time depends on it.
template <class S>
float cost(const ProductParams& params, int processors) {
  constexpr float products_of_processor = 2.3e12f, cache_bytes = 5.5e12f;
  const float blocks = static_cast<float>((params.tokens + S::token_count - 1) / S::token_count) *
                       static_cast<float>((params.tiles * tile_rows + S::rows - 1) / S::rows);
  const float turns = static_cast<float>((static_cast<int>(blocks) + processors - 1) / processors);
  const float weight = static_cast<float>(S::tile_bytes) / (16 * stage_columns);
  const float products = turns * (S::rows * S::token_count) / products_of_processor;
  const float bytes = blocks * (2.0f * S::token_count + weight * S::rows) / cache_bytes;
  return products > bytes ? products : bytes;
}

struct Choice {
  const char* (*launch)(const ProductParams& params, void* stream);
  float cost;
};

template <class S>
Choice choice(const ProductParams& params, int processors) {
  return {[](const ProductParams& p, void* stream) {
            const dim3 grid(static_cast<unsigned>((p.tokens + S::token_count - 1) / S::token_count),
                            static_cast<unsigned>((p.tiles * tile_rows + S::rows - 1) / S::rows));
            return launch(multiply<S>, LaunchShape{grid, S::threads, S::shared_bytes}, p, stream);
          },
          cost<S>(params, processors)};
}

template <Packing packing>
const char* launch_cheapest(const ProductParams& params, int processors, void* stream) {
  const Choice choices[] = {choice<Shape<packing, 8, 2, 128, 3, 1>>(params, processors),
                            choice<Shape<packing, 4, 4, 64, 3, 2>>(params, processors),
                            choice<Shape<packing, 4, 2, 128, 3, 2>>(params, processors),
                            choice<Shape<packing, 4, 2, 64, 4, 3>>(params, processors),
                            choice<Shape<packing, 4, 1, 64, 4, 4>>(params, processors)};
  const Choice* best = choices;
  for (const Choice& other : choices) {
    if (other.cost < best->cost) best = &other;
  }
  return best->launch(params, stream);
}

ProductParams params_of(const PackedProduct& args) {
  const std::int64_t rows = args.out.shape[1] * (args.gated ? 2 : 1);
  const MatrixShape shape = matrix_shape(rows, args.x.shape[1], item(args.packing), 0);
  ProductParams params{};
  params.x = args.x.as<bf16>();
  params.weights = args.weights.as<std::byte>();
  params.out = args.out.data;
  params.tokens = static_cast<int>(args.x.shape[0]);
  params.columns = static_cast<int>(args.x.shape[1]);
  params.rows = static_cast<int>(rows);
  params.tiles = shape.tiles;
  params.piece_tiles = args.pieces == 0 ? 1 : static_cast<int>(rows / args.pieces / tile_rows);
  params.items = shape.items;
  params.stages = (params.columns + stage_columns - 1) / stage_columns;
  params.tile_bytes = shape.tile_bytes;
  params.gated = args.gated;
  params.float_out = args.out.dtype == DType::f32;
  return params;
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_packed_product, hrmcore::PackedProduct) {
  using namespace hrmcore::cuda;
  const ProductParams params = params_of(args);
  const int processors =
      args.processors > 0 ? static_cast<int>(args.processors) : multiprocessors_of_device();
  if (args.packing == hrmcore::Packing::int8)
    return launch_cheapest<hrmcore::Packing::int8>(params, processors, stream);
  return launch_cheapest<hrmcore::Packing::int4>(params, processors, stream);
}
