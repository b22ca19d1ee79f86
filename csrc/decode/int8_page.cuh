// Numbers of an int8 cache on the device: rounded, packed, and as the tensor cores take them.
#pragma once

#include "core/cuda.cuh"
#include "decode/int8_page.h"

namespace hrmcore::cuda {

// |x| as a whole number that grows with it: a NaN is the largest, so that a maximum does not lose it.
__device__ __forceinline__ int magnitude(float x) {
  return static_cast<int>(__float_as_uint(x) & 0x7fffffffu);
}

// The scale of numbers of which the largest has this magnitude, and what they are multiplied by. Numbers too small for
// a reciprocal are taken for zeros; a number that is not finite leaves such a scale.
struct Int8Scale {
  float scale, inverse;

  __device__ __forceinline__ Int8Scale(int largest, bool as_bf16) {
    constexpr float least = 0x1p-100f;
    scale = __uint_as_float(static_cast<std::uint32_t>(largest)) * (1.0f / 127);
    if (as_bf16) scale = rounded<bf16>(scale);
    if (scale < least) scale = 0;
    inverse = scale == 0 ? 0 : quick_reciprocal(scale);
  }
};

// Four numbers as bytes, rounded to the nearest, q + 128: what stands in the last place of float32 beside 1.5 * 2^23.
__device__ __forceinline__ std::uint32_t to_bytes(const float (&x)[4], float inverse) {
  constexpr float last_place_is_one = 12582912.0f + 128.0f;
  std::uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(x[i] * inverse + last_place_is_one);
  return byte_permute(byte_permute(bits[0], bits[1], 0x0040), byte_permute(bits[2], bits[3], 0x0040), 0x5410);
}

// Of four bytes q + 128 two as f16, exact: those that the selector puts into the last places of 1024.
__device__ __forceinline__ f16x2 from_bytes(std::uint32_t bytes, std::uint32_t selector) {
  constexpr f16x2 thousand_24 = 0x64006400, one = 0x3c003c00, minus_1152 = 0xe480e480;
  return multiply_add(byte_permute(bytes, thousand_24, selector), one, minus_1152);
}
// The first and last two of four; the even and the odd ones.
constexpr std::uint32_t first_two = 0x5150, last_two = 0x5352, even_two = 0x5250, odd_two = 0x5351;

// Two numbers, each as the sum of two f16: 22 bits of it, of numbers below 2^-14 what is above 2^-25.
__device__ __forceinline__ void split_pair_f16(float x, float y, f16x2& first, f16x2& second) {
  first = to_f16x2(x, y);
  second = to_f16x2(x - half_of_f16(first, 0), y - half_of_f16(first, 1));
}

// The 16 bytes of a token's scales.
using Int8Scales = Packed<std::uint32_t, 4>;
__device__ __forceinline__ float key_scale(const Int8Scales& scales, int group) {
  const std::uint32_t pair = scales.at[group / 2];
  return __uint_as_float(group % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
}
__device__ __forceinline__ float value_scale(const Int8Scales& scales) {
  return __uint_as_float(scales.at[Int8Page::value_scale / 4]);
}

// Eight rows of a page in a stage of a ring, as the loader leaves them: keys, values, scales. Rows of d bytes are pieces
// of 16; those of a row have changed places, so that 8 rows of a piece, and 4 rows of two neighbours, lie in different
// banks.
struct Int8Stage {
  int at, head_dim, shift;  // where it begins in shared memory; 1 << shift pieces are a row
  static constexpr int rows = 8;

  // Of a row, of its piece.
  __device__ __forceinline__ int keys(int row, int piece) const {
    const int exchanged = ((row & 3) << 1 | row >> 2) & ((1 << shift) - 1);
    return at + (row << (shift + 4)) + 16 * (piece ^ exchanged);
  }
  __device__ __forceinline__ int values(int row, int piece) const {
    return keys(row, piece) + rows * head_dim;
  }
  __device__ __forceinline__ int scales(int row) const {
    return at + 2 * rows * head_dim + Int8Page::scale_bytes * row;
  }
};

}  // namespace hrmcore::cuda
