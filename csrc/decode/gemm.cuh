// The GEMMs of a decode step: tiles of weights from the loader's stages, activations from shared memory.
//
// mma.sync takes the weights as its 16 rows and the requests as its 8 columns. With g = lane / 4 and h = lane
// % 4 a lane holds of 16 columns of weights 4h to 4h + 3 in rows g and g + 8, and of the activations the same
// 4 of request g: the sum over columns has no order to keep, so each lane's four are neighbours.
//
// A warp multiplies its own share of the columns, and itself brings the activations of these alone: nothing in
// a block waits for another warp before the partial sums are added.
#pragma once

#include "decode/loader.cuh"

namespace hrmcore::cuda {

// A warp's share of the activations: (16 columns, B, 16) bfloat16, as in global memory.
struct Activations {
  int offset, batch;  // offset in shared memory, in bytes

  __device__ __forceinline__ SharedArray<Packed<bf16, 8>> pieces() const {
    return shared_array<Packed<bf16, 8>>(static_cast<std::size_t>(offset));
  }
};

// Takes them to the tensor cores, 16 columns after 16 columns. Lanes of requests that there are not take the last
// one's: what they make of it nobody reads.
class ActivationReader {
 public:
  __device__ __forceinline__ explicit ActivationReader(const Activations& x)
      : at_(x.offset + 8 * (4 * min(lane_id() / 4, x.batch - 1) + lane_id() % 4)), stride_(32 * x.batch) {}

  // This lane's two registers of the next 16 columns.
  __device__ __forceinline__ void take(bf16x2 (&b)[2]) {
    const Packed<bf16x2, 2> pair = shared_array<Packed<bf16x2, 2>>(static_cast<std::size_t>(at_))[0];
    at_ += stride_;
    b[0] = pair.at[0];
    b[1] = pair.at[1];
  }

 private:
  int at_, stride_;  // in bytes
};

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

// What a lane reads of an item: its piece, and the scales of rows g and g + 8 for each group of columns.
template <Packing packing>
struct LaneItem {
  static constexpr int groups = ItemOf<packing>::groups;
  Packed<std::uint32_t, 4> piece;
  float scales[groups == 0 ? 1 : groups][2];

  __device__ __forceinline__ void read(int item) {
    piece = shared_array<Packed<std::uint32_t, 4>>(static_cast<std::size_t>(item))[lane_id()];
    const SharedArray<bf16> rows = shared_array<bf16>(static_cast<std::size_t>(item + fragment_bytes));
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const int row = tile_rows * group + lane_id() / 4;
      scales[group][0] = to_float(static_cast<bf16>(rows[row]));
      scales[group][1] = to_float(static_cast<bf16>(rows[row + 8]));
    }
  }

  // sum += item x
  __device__ __forceinline__ void multiply(float (&sum)[4], ActivationReader& x) const {
    bf16x2 b[2];
    if constexpr (packing == Packing::bf16) {
      x.take(b);
      const bf16x2 a[4] = {piece.at[0], piece.at[1], piece.at[2], piece.at[3]};
      mma_bf16(sum, a, b);
    } else {
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
          x.take(b);
          mma_bf16(of_group, a, b);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += scales[group][i / 2] * of_group[i];
      }
    }
  }
};

// This warp's sums of a tile: lane 4g + h gets rows g and g + 8 of requests 2h and 2h + 1. Even and odd items
// of a stage are added up apart, so that an mma waits for the one before the last. `items`: how many of the
// tile are this warp's.
template <Packing packing, class Stages>
__device__ __forceinline__ void multiply_tile(float (&sum)[4], Stages& loader, int stages, int items,
                                              const Activations& activations) {
  ActivationReader x(activations);
  float odd[4] = {};
#pragma unroll
  for (float& s : sum) s = 0;
#pragma unroll 1
  for (int left = items; stages > 0; --stages, left -= stage_items) {
    const int slot = loader.wait();
    LaneItem<packing> lane[stage_items];
    if (left >= stage_items) {
#pragma unroll
      for (int i = 0; i < stage_items; ++i) lane[i].read(slot + i * item_bytes<packing>);
    } else {
#pragma unroll
      for (int i = 0; i < stage_items - 1; ++i) {
        if (i < left) lane[i].read(slot + i * item_bytes<packing>);
      }
    }
    loader.refill();
    if (packing == Packing::bf16 && left >= stage_items) {  // worth a copy where it is four instructions
#pragma unroll
      for (int i = 0; i < stage_items; ++i) lane[i].multiply(i % 2 == 0 ? sum : odd, x);
    } else {
#pragma unroll
      for (int i = 0; i < stage_items; ++i) {
        if (i < left) lane[i].multiply(i % 2 == 0 ? sum : odd, x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += odd[i];
}

}  // namespace hrmcore::cuda
