// The GEMMs of a decode step: tiles of weights from the loader's stages, activations from shared memory.
//
// mma.sync takes the weights as its 16 rows and 8 requests as its columns; for more requests there are 2 or 4 mma of
// a piece. With g = lane / 4 and h = lane % 4 a lane holds of 16 columns of weights 4h to 4h + 3 in rows g and g + 8,
// and of the activations the same 4 of request g: the sum over columns has no order to keep, so each lane's four are
// neighbours.
//
// A warp multiplies its own share of the columns, and itself brings the activations of these alone: nothing in
// a block waits for another warp before the partial sums are added.
//
// Instructions of a lane for an item, at least: its piece 1, activations 1 for each 16 columns, a product for each
// of these; int8 12 that make f16 of bytes, int4 20 and 16; scales 3 a group, sums 4 (2 of a single request). Of each
// 8 requests more only activations, products and sums.
#pragma once

#include "decode/activations.cuh"

namespace hrmcore::cuda {

constexpr f16x2 half_one = 0x3c003c00;

// Four bytes as two pairs of f16, each a whole number times 2^-24: below 2^-14 f16 are such, and so an integer under a
// sign needs nothing but its place. Of each 16 bits the first pair has the lower seven and the highest for its sign.
__device__ __forceinline__ void expand_bytes(std::uint32_t bytes, f16x2& first, f16x2& second) {
  constexpr std::uint32_t sign_and_magnitude = 0x807f807f;
  first = bytes & sign_and_magnitude;
  second = byte_permute(bytes, 0, 0x2301) & sign_and_magnitude;
}

// The four registers of 16 columns, of eight nibbles w + 8: w times 2^-24 in rows g, times 2^-20 in rows g + 8, whose
// nibbles are read where they stand.
__device__ __forceinline__ void expand_nibbles(std::uint32_t nibbles, f16x2 (&a)[4]) {
  constexpr f16x2 minus_8 = 0x80088008, minus_128 = 0x80808080;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t four = nibbles >> (4 * i);
    a[i] = multiply_add(four & 0x000f000f, half_one, minus_8);
    a[i + 1] = multiply_add(four & 0x00f000f0, half_one, minus_128);
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

  // sum += item x, of each group of 8 requests: a weight is read and expanded once for all of them. Of a `single`
  // request each lane has the two rows twice, and adds up one of them. `number`: of the item's first 16 columns, among
  // those that x has.
  template <bool single, int groups_of_8, class Reader>
  __device__ __forceinline__ void multiply(float (&sum)[groups_of_8][4], Reader& x, int number) const {
    Columns<groups_of_8> b;
    if constexpr (packing == Packing::bf16) {
      x.take(b, number);
      const bf16x2 a[4] = {piece.at[0], piece.at[1], piece.at[2], piece.at[3]};
#pragma unroll
      for (int eight = 0; eight < groups_of_8; ++eight) mma_bf16(sum[eight], a, b[eight]);
      x.taken(number);
    } else {
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        float of_group[groups_of_8][4] = {};
#pragma unroll
        for (int half = 2 * group; half < 2 * group + 2; ++half) {
          f16x2 a[4];
          if constexpr (packing == Packing::int8) {
            expand_bytes(piece.at[2 * half], a[0], a[2]);
            expand_bytes(piece.at[2 * half + 1], a[1], a[3]);
          } else {
            expand_nibbles(piece.at[half], a);
          }
          x.take(b, number + half);
#pragma unroll
          for (int eight = 0; eight < groups_of_8; ++eight) mma_f16(of_group[eight], a, b[eight]);
          x.taken(number + half);
        }
        const float low = __uint_as_float(scales.at[group] << 16),
                    high = __uint_as_float(scales.at[group] & 0xffff0000u);
#pragma unroll
        for (int eight = 0; eight < groups_of_8; ++eight) {
          sum[eight][0] += low * of_group[eight][0];
          if (!single) sum[eight][1] += low * of_group[eight][1];
          sum[eight][2] += high * of_group[eight][2];
          if (!single) sum[eight][3] += high * of_group[eight][3];
        }
      }
    }
  }
};

// A warp's sums of a tile, for each group of 8 requests: lane 4g + h has rows g and g + 8 of requests 2h and 2h + 1.
// Even and odd items of bf16 are added up apart, so that an mma waits for the one before the last.
template <Packing packing, int groups>
struct TileSums {
  float even[groups][4] = {}, odd[groups][4] = {};

  __device__ __forceinline__ float all(int eight, int i) const {
    return packing == Packing::bf16 ? even[eight][i] + odd[eight][i] : even[eight][i];
  }
};

// Adds a stage of a tile, of which `left` items are this warp's. `number`: of its first 16 columns, in x's window.
template <Packing packing, bool single, int groups, class Stages, class Reader>
__device__ __forceinline__ void multiply_stage(TileSums<packing, groups>& sums, Stages& loader, int left,
                                               Reader& x, int number) {
  constexpr int sixteens = ItemOf<packing>::columns / 16;
  const int slot = loader.wait();
  const auto sums_of = [&](int i) -> float (&)[groups][4] {
    return packing != Packing::bf16 || i % 2 == 0 ? sums.even : sums.odd;
  };
  if constexpr (groups > 1 && packing != Packing::bf16) {
    // Item after item: with a stage of them the sums would not fit in the registers.
    loader.refill();
#pragma unroll
    for (int i = 0; i < stage_items<packing>; ++i) {
      if (i >= left) break;
      LaneItem<packing> lane;
      lane.read(slot + i * item_bytes<packing>);
      lane.template multiply<single>(sums_of(i), x, number + i * sixteens);
    }
    return;
  }
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
    for (int i = 0; i < stage_items<packing>; ++i) {
      lane[i].template multiply<single>(sums_of(i), x, number + i * sixteens);
    }
  } else {
#pragma unroll
    for (int i = 0; i < stage_items<packing>; ++i) {
      if (i >= left) break;
      lane[i].template multiply<single>(sums_of(i), x, number + i * sixteens);
    }
  }
}

// Adds `stages` stages of a tile, at least one, with the activations that x has. `items`: how many of these stages' and
// later ones' are this warp's. x's window is made of whole stages, or they of windows.
template <Packing packing, bool single, int groups, class Stages, class Reader>
__device__ __forceinline__ void multiply_stages(TileSums<packing, groups>& sums, Stages& loader, int stages,
                                                int items, Reader& x) {
  constexpr int sixteens = stage_items<packing> * ItemOf<packing>::columns / 16;
  constexpr int together = Reader::window > sixteens ? Reader::window / sixteens : 1;
  static_assert(Reader::window % sixteens == 0 || sixteens % Reader::window == 0);
#pragma unroll 1
  do {
    multiply_stage<packing, single>(sums, loader, items, x, 0);
    items -= stage_items<packing>;
#pragma unroll
    for (int turn = 1; turn < together; ++turn) {
      if (--stages == 0) return;
      multiply_stage<packing, single>(sums, loader, items, x, turn * sixteens);
      items -= stage_items<packing>;
    }
  } while (--stages > 0);
}

}  // namespace hrmcore::cuda
