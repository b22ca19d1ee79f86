#include "decode/packed_product.h"

#include "core/cuda.cuh"
#include "decode/schedule.h"

// A block multiplies a tile of tokens with a tile of rows. Its warps own rows of their own: a weight is made bfloat16
// once a block, in the registers of the lane that the layout gives it. Tokens are the 16 rows of mma.sync and weights
// its columns: with g = lane / 4 and h = lane % 4 a lane holds weights 4h to 4h + 3 of rows g and g + 8 of a tile, so
// two products of 8 columns each, and of the activations the same four columns of tokens g and g + 8.
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

// Of 16 columns of a tile: the registers of rows 0 to 7, and of rows 8 to 15.
struct Weights {
  bf16x2 low[2], high[2];
};

// Four bytes w + 128 times a scale. As the upper bits of float32's mantissa a byte b makes 128 + b / 256, whose product
// with 256 scales is exact, and so is the sum: it is rounded once, to bfloat16.
__device__ __forceinline__ void scale_bytes(std::uint32_t bytes, float scale, bf16x2 (&scaled)[2]) {
  const float by = 256 * scale, offset = -(128 * 256 + 128) * scale;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const std::uint32_t first = pair == 0 ? 0x7404 : 0x7424, second = pair == 0 ? 0x7414 : 0x7434;
    const float x = __uint_as_float(byte_permute(bytes, 0x43000000, first)),
                y = __uint_as_float(byte_permute(bytes, 0x43000000, second));
    scaled[pair] = to_bf16x2(x * by + offset, y * by + offset);
  }
}

// A lane's part of a tile's items of a stage.
template <Packing packing>
struct LanePiece;

template <>
struct LanePiece<Packing::int8> {
  Packed<std::uint32_t, 4> words;
  float scale_low, scale_high;

  __device__ __forceinline__ void read(int tile, int sixteen) {
    if (sixteen % 2 != 0) return;  // an item is 32 columns
    const int item = tile + sixteen / 2 * item_bytes<Packing::int8>;
    words = load_shared<4>(shared_array<std::uint32_t>(static_cast<std::size_t>(item + 16 * lane_id())));
    const bf16x2 scales =
        shared_array<bf16x2>(static_cast<std::size_t>(item + fragment_bytes))[lane_id() / 4];
    scale_low = __uint_as_float(scales << 16) / 16;  // mma_layout.py's are 16 times the weights' own
    scale_high = __uint_as_float(scales & 0xffff0000u) / 16;
  }
  __device__ __forceinline__ Weights take(int sixteen) const {
    Weights weights;
    scale_bytes(words.at[sixteen % 2 * 2], scale_low, weights.low);
    scale_bytes(words.at[sixteen % 2 * 2 + 1], scale_high, weights.high);
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
  // A nibble n = w + 8 makes 128 + n, and (128 + n) / 16 - 8.5 is w / 16: exact. Its product with 16 scales is rounded.
  __device__ __forceinline__ Weights take(int sixteen) const {
    constexpr bf16x2 sixteenth = 0x3d803d80, minus_8_5 = 0xc108c108, minus_0 = 0x80008000;
    const bf16x2 pair = scales.at[sixteen / 2];
    const bf16x2 low = byte_permute(pair, 0, 0x1010), high = byte_permute(pair, 0, 0x3232);
    bf16x2 scaled[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bf16x2 raised = masked(words.at[sixteen] >> (4 * i), 0x000f000f, 0x43004300);
      const bf16x2 whole = multiply_add_bf16(raised, sixteenth, minus_8_5);
      scaled[i] = multiply_add_bf16(whole, i % 2 == 0 ? low : high, minus_0);
    }
    return {{scaled[0], scaled[2]}, {scaled[1], scaled[3]}};
  }
};

// ---- products

// A warp's sums: of each 16 tokens and 16 rows, lane 4g + h has rows 2h and 2h + 1 of both halves of the tile, first of
// token g, then of token g + 8.
template <class S>
struct Sums {
  float low[S::token_count / 16][S::row_tiles][4] = {}, high[S::token_count / 16][S::row_tiles][4] = {};
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
    for (int token = 0; token < S::token_count; token += 16) {
      const Packed<std::uint32_t, 2> first = load_shared<2>(rows + 8 * token),
                                     second = load_shared<2>(rows + 8 * (token + 8));
      const bf16x2 a[4] = {first.at[0], second.at[0], first.at[1], second.at[1]};
#pragma unroll
      for (int tile = 0; tile < S::row_tiles; ++tile) {
        mma_bf16(sums.low[token / 16][tile], a, weights[tile].low);
        mma_bf16(sums.high[token / 16][tile], a, weights[tile].high);
      }
    }
  }
}

// ---- results

template <class E>
__device__ __forceinline__ void store_two(const ProductParams& params, int token, int column, int columns,
                                          float first, float second) {
  E* const out = static_cast<E*>(params.out) + static_cast<std::int64_t>(token) * columns + column;
  if (columns % 2 == 0) {
    if (column < columns) store<2>(out, {{first, second}});
  } else {
    if (column < columns) store<1>(out, {{first}});
    if (column + 1 < columns) store<1>(out + 1, {{second}});
  }
}

// Two neighbouring rows of a tile and their partners, of one token.
__device__ __forceinline__ void store_rows(const ProductParams& params, int token, int tile, const float* low,
                                           const float* high) {
  const int two = 2 * (lane_id() % 4);
  const auto put = [&](int column, int columns, float first, float second) {
    if (params.float_out) {
      store_two<float>(params, token, column, columns, first, second);
    } else {
      store_two<bf16>(params, token, column, columns, first, second);
    }
  };
  if (params.gated) {
    const auto gated = [&](int i) { return low[i] * quick_reciprocal(1 + quick_exp(-low[i])) * high[i]; };
    put(8 * tile + two, params.rows / 2, gated(0), gated(1));
    return;
  }
  const int piece = tile / params.piece_tiles, half = 8 * params.piece_tiles;
  const int column = 2 * half * piece + 8 * (tile - piece * params.piece_tiles) + two;
  put(column, params.rows, low[0], low[1]);
  put(column + half, params.rows, high[0], high[1]);
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
    for (int half = 0; half < S::token_count / 8; ++half) {
      const int token = first_token + 8 * half + lane_id() / 4, i = half % 2 * 2;
      if (token < params.tokens)
        store_rows(params, token, own, sums.low[half / 2][tile] + i, sums.high[half / 2][tile] + i);
    }
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
