// The GEMMs of a decode step: weights in fragment order stream through a ring of each warp's own, activations
// lie in shared memory. A warp loads for itself: its copies run ahead of what it consumes.
//
// mma.sync takes the weights as its 16 rows and the requests as its 8 columns. With g = lane / 4 and h = lane
// % 4 a lane holds of 16 columns of weights 4h to 4h + 3 in rows g and g + 8, and of the activations the same
// 4 of request g: the sum over columns has no order to keep, so each lane's four are neighbours.
#pragma once

#include "core/cuda.cuh"
#include "decode/schedule.h"

namespace hrmcore::cuda {

constexpr int decode_warps = 8, decode_threads = 32 * decode_warps;
constexpr int partial_floats = decode_warps * tile_rows * max_batch;

// Shared memory: partial sums of two tiles, the warps' sums of squares for two norms, where the requests' new
// tokens stand, activations (or what the attention exchanges), rings.
constexpr int squares_offset = 2 * partial_floats * 4;
constexpr int positions_offset = squares_offset + 2 * decode_warps * max_batch * 4;
constexpr int activations_offset = positions_offset + 128;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// This warp's items of one matrix, in the order in which it takes them: those of its share of each of the
// block's tiles. begin() and fetch() load, take() consumes; `stages - 1` items are on their way at any time.
template <Packing packing, int stages>
class WeightStream {
 public:
  static constexpr int groups = ItemOf<packing>::groups;

  __device__ __forceinline__ explicit WeightStream(int ring_offset)
      : ring_(shared_array<std::uint8_t>(ring_offset + warp_id() * stages * item_bytes<packing>)) {}

  // Starts on a matrix; what it was given before is over.
  __device__ __forceinline__ void begin(const Matrix& matrix) {
    matrix_ = matrix;
    tile_ = static_cast<int>(blockIdx.x);
    item_ = warp_id();
    stage_ = 0;
    if (item_ >= matrix.items) tile_ = matrix.tiles;
#pragma unroll
    for (int stage = 0; stage < stages - 1; ++stage) fetch(stage);
  }

  __device__ __forceinline__ const Matrix& matrix() const { return matrix_; }
  __device__ __forceinline__ int depth() const { return matrix_.items * ItemOf<packing>::columns; }

  // The next item: this lane's piece, and the scales of rows g and g + 8 for each group.
  __device__ __forceinline__ void take(Packed<std::uint32_t, 4>& piece, float (&scales)[2][2]) {
    wait_for_copies<stages - 2>();
    const SharedArray<std::uint8_t> item = ring_ + stage_ * item_bytes<packing>;
    piece = SharedArray<Packed<std::uint32_t, 4>>{
        reinterpret_cast<Packed<std::uint32_t, 4>*>(item.data)}[lane_id()];
    if constexpr (groups > 0) {
      __syncwarp();  // the scales were copied by other lanes
      const SharedArray<bf16> rows{reinterpret_cast<bf16*>((item + fragment_bytes).data)};
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        const int row = tile_rows * group + lane_id() / 4;
        scales[group][0] = to_float(static_cast<bf16>(rows[row]));
        scales[group][1] = to_float(static_cast<bf16>(rows[row + 8]));
      }
    }
    fetch(stage_ == 0 ? stages - 1 : stage_ - 1);  // the item before's, which all lanes have read
    stage_ = stage_ + 1 == stages ? 0 : stage_ + 1;
  }

 private:
  __device__ __forceinline__ void fetch(int stage) {
    if (tile_ < matrix_.tiles) {
      const std::byte* item =
          matrix_.data + (static_cast<std::int64_t>(tile_) * matrix_.items + item_) * item_bytes<packing>;
      const int lane = lane_id();
      const SharedArray<std::uint8_t> target = ring_ + stage * item_bytes<packing>;
      copy_async((target + 16 * lane).data, item + 16 * lane, 16);
      if (16 * lane < groups * group_scale_bytes) {
        copy_async((target + (fragment_bytes + 16 * lane)).data, item + fragment_bytes + 16 * lane, 16);
      }
      item_ += decode_warps;
      if (item_ >= matrix_.items) {
        item_ = warp_id();
        tile_ += static_cast<int>(gridDim.x);
      }
    }
    commit_copies();
  }

  SharedArray<std::uint8_t> ring_;
  Matrix matrix_{nullptr, 0, 0};
  int tile_ = 0, item_ = 0, stage_ = 0;
};

// Activations in shared memory: of each 16 columns of the matrix, each request's 16 elements in turn.
struct Activations {
  SharedArray<bf16> data;
  int batch;

  __device__ __forceinline__ void put(int request, int k, const Packed<bf16, 8>& eight) const {
    const SharedArray<Packed<bf16, 8>> pieces{reinterpret_cast<Packed<bf16, 8>*>(data.data)};
    pieces[(k / 16 * batch + request) * 2 + k % 16 / 8] = eight;
  }
  // This lane's two registers of 16 columns.
  __device__ __forceinline__ void take(int sixteen, bf16x2 (&b)[2]) const {
    const int request = lane_id() / 4;
    b[0] = b[1] = 0;
    if (request < batch) {
      const SharedArray<Packed<bf16x2, 2>> pieces{reinterpret_cast<Packed<bf16x2, 2>*>(data.data)};
      const Packed<bf16x2, 2> pair = pieces[(sixteen * batch + request) * 4 + lane_id() % 4];
      b[0] = pair.at[0];
      b[1] = pair.at[1];
    }
  }
};

__device__ __forceinline__ Activations activations(const DecodeParams& params) {
  return {shared_array<bf16>(activations_offset), params.batch};
}

// Four bytes w + 128, as two pairs of bfloat16: exact.
__device__ __forceinline__ void expand_bytes(std::uint32_t bytes, bf16x2& first, bf16x2& second) {
  constexpr std::uint32_t magic = 0x4b000000;  // 2^23, as float32: its last byte counts ones
  float w[4];
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    w[i] = __uint_as_float(byte_permute(bytes, magic, 0x7440 | i)) - (8388608.0f + 128.0f);
  }
  first = to_bf16x2(w[0], w[1]);
  second = to_bf16x2(w[2], w[3]);
}

// The four registers of 16 columns, of eight nibbles w + 8: exact.
__device__ __forceinline__ void expand_nibbles(std::uint32_t nibbles, bf16x2 (&a)[4]) {
  constexpr bf16x2 magic = 0x43004300, one = 0x3f803f80,
                   minus_136 = 0xc308c308;  // 128: its last bit counts ones
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = multiply_add((nibbles >> (4 * i) & 0x000f000f) | magic, one, minus_136);
  }
}

// sum += item x
template <Packing packing>
__device__ __forceinline__ void multiply_item(float (&sum)[4], const Packed<std::uint32_t, 4>& piece,
                                              const float (&scales)[2][2], const Activations& x, int item) {
  bf16x2 b[2];
  if constexpr (packing == Packing::bf16) {
    x.take(item, b);
    const bf16x2 a[4] = {piece.at[0], piece.at[1], piece.at[2], piece.at[3]};
    mma_bf16(sum, a, b);
  } else {
    constexpr int groups = ItemOf<packing>::groups;
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      float of_group[4] = {};
#pragma unroll
      for (int half = 2 * group; half < 2 * group + 2; ++half) {
        bf16x2 a[4];
        if constexpr (packing == Packing::int8) {
          expand_bytes(piece.at[2 * half], a[0], a[2]);
          expand_bytes(piece.at[2 * half + 1], a[1], a[3]);
        } else {
          expand_nibbles(piece.at[half], a);
        }
        x.take(2 * groups * item + half, b);
        mma_bf16(of_group, a, b);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += scales[group][i / 2] * of_group[i];
    }
  }
}

// Multiplies the stream's matrix with the activations. finish(tile, row, request, sum of the tile's row
// `row`, sum of row + 8) runs once for each row < 8 and request, in the threads that `finishes` names.
template <Packing packing, int stages, class Finish>
__device__ __forceinline__ void multiply(const DecodeParams& params, WeightStream<packing, stages>& stream,
                                         const Finish& finish) {
  const Activations x = activations(params);
  const int lane = lane_id(), tiles = stream.matrix().tiles, items = stream.matrix().items;
  const int row = static_cast<int>(threadIdx.x) / max_batch,
            request = static_cast<int>(threadIdx.x) % max_batch;
  int parity = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    float sum[4] = {};
    for (int item = warp_id(); item < items; item += decode_warps) {
      Packed<std::uint32_t, 4> piece;
      float scales[2][2];
      stream.take(piece, scales);
      multiply_item<packing>(sum, piece, scales, x, item);
    }
    const SharedArray<float> partial = shared_array<float>(0) + parity * partial_floats;
    const SharedArray<Packed<float, 2>> mine{
        reinterpret_cast<Packed<float, 2>*>((partial + warp_id() * tile_rows * max_batch).data)};
    mine[lane] = Packed<float, 2>{{sum[0], sum[1]}};
    mine[lane + 32] = Packed<float, 2>{{sum[2], sum[3]}};
    __syncthreads();
    if (row < 8 && request < params.batch) {
      float low = 0, high = 0;
#pragma unroll
      for (int warp = 0; warp < decode_warps; ++warp) {
        const int first = (warp * tile_rows + row) * max_batch + request;
        low += partial[first];
        high += partial[first + 8 * max_batch];
      }
      finish(tile, row, request, low, high);
    }
    parity ^= 1;
  }
}

}  // namespace hrmcore::cuda
