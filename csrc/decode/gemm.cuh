// The GEMMs of a decode step: tiles of weights from the loader's stages, activations from shared memory.
//
// mma.sync takes the weights as its 16 rows and the requests as its 8 columns. With g = lane / 4 and h = lane
// % 4 a lane holds of 16 columns of weights 4h to 4h + 3 in rows g and g + 8, and of the activations the same
// 4 of request g: the sum over columns has no order to keep, so each lane's four are neighbours.
//
// A warp multiplies its own share of the columns, and itself brings the activations of these alone: nothing in
// a block waits for another warp before the partial sums are added.
//
// Instructions of a lane for an item, at least: its piece 1, activations 1 for each 16 columns, a product for each
// of these; int8 8 and 8 that make f16 of bytes, int4 20 and 16; scales 3 a group, sums 4.
#pragma once

#include "decode/activations.cuh"

namespace hrmcore::cuda {

constexpr f16x2 half_one = 0x3c003c00, half_sixteenth = 0x2c002c00;
constexpr f16x2 half_magic = 0x64006400;  // 1024: the last bit counts ones

// Four bytes w + 128, as two pairs of f16: exact.
__device__ __forceinline__ void expand_bytes(std::uint32_t bytes, f16x2& first, f16x2& second) {
  constexpr f16x2 minus_1152 = 0xe480e480;
  first = multiply_add(byte_permute(bytes, half_magic, 0x5150), half_one, minus_1152);
  second = multiply_add(byte_permute(bytes, half_magic, 0x5352), half_one, minus_1152);
}

// The four registers of 16 columns, of eight nibbles w + 8: exact. Every other one is read 16 times as large, where
// it stands.
__device__ __forceinline__ void expand_nibbles(std::uint32_t nibbles, f16x2 (&a)[4]) {
  constexpr f16x2 minus_1032 = 0xe408e408, minus_72 = 0xd480d480;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t four = nibbles >> (4 * i);
    a[i] = multiply_add(masked(four, 0x000f000f, half_magic), half_one, minus_1032);
    a[i + 1] = multiply_add(masked(four, 0x00f000f0, half_magic), half_sixteenth, minus_72);
  }
}

// What a lane reads of an item: its piece, and for each group of columns the scales of rows g and g + 8.
template <Packing packing>
struct LaneItem {
  static constexpr int groups = ItemOf<packing>::groups;
  Packed<std::uint32_t, 4> piece;
  Packed<bf16x2, groups == 0 ? 1 : groups> scales;

  __device__ __forceinline__ void read(int item) {
    piece = shared_array<Packed<std::uint32_t, 4>>(static_cast<std::size_t>(item))[lane_id()];
    if constexpr (groups > 0) {
      scales = shared_array<Packed<bf16x2, groups>>(
          static_cast<std::size_t>(item + fragment_bytes))[lane_id() / 4];
    }
  }

  // sum += item x
  __device__ __forceinline__ void multiply(float (&sum)[4], ActivationReader& x) const {
    std::uint32_t b[2];
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
          f16x2 a[4];
          if constexpr (packing == Packing::int8) {
            expand_bytes(piece.at[2 * half], a[0], a[2]);
            expand_bytes(piece.at[2 * half + 1], a[1], a[3]);
          } else {
            expand_nibbles(piece.at[half], a);
          }
          x.take(b);
          mma_f16(of_group, a, b);
        }
        const float low = __uint_as_float(scales.at[group] << 16),
                    high = __uint_as_float(scales.at[group] & 0xffff0000u);
        sum[0] += low * of_group[0];
        sum[1] += low * of_group[1];
        sum[2] += high * of_group[2];
        sum[3] += high * of_group[3];
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
  for (int left = items; stages > 0; --stages, left -= stage_items<packing>) {
    const int slot = loader.wait();
    LaneItem<packing> lane[stage_items<packing>];
    if (left >= stage_items<packing>) {
#pragma unroll
      for (int i = 0; i < stage_items<packing>; ++i) lane[i].read(slot + i * item_bytes<packing>);
    } else {
#pragma unroll
      for (int i = 0; i < stage_items<packing> - 1; ++i) {
        if (i >= left) break;
        lane[i].read(slot + i * item_bytes<packing>);
      }
    }
    loader.refill();
    if (left >= stage_items<packing>) {
#pragma unroll
      for (int i = 0; i < stage_items<packing>; ++i) lane[i].multiply(i % 2 == 0 ? sum : odd, x);
    } else {
#pragma unroll
      for (int i = 0; i < stage_items<packing>; ++i) {
        if (i >= left) break;
        lane[i].multiply(i % 2 == 0 ? sum : odd, x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += odd[i];
}

}  // namespace hrmcore::cuda
