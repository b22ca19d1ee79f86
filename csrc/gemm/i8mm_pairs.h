// int8 and int4 weights times many rows of activations on FEAT_I8MM, whose smmla multiplies two rows of eight
// bytes by two others: twice the products of a dot4. For the instruction set `i8mm`.
//
// The weights of a chunk are brought once into pairs of rows, as signed bytes without their offset. A sum is
// the same as in gemm.cpp's tiles: for each group the exact integer product, then one fused multiply-add of it
// with (weight scale * activation scale). So its bits do not depend on which of the two computes it.
//
// A group and a tile of 8 rows by 6 tokens take 48 smmla, 16 loads of weights, 24 of activations and some 60
// instructions for the scales: 1,536 products in 150 instructions. What the compiler makes of it is in
// csrc/neon.txt.
#pragma once

#if defined(HRMCORE_ISA_i8mm)

#include "gemm/gemm.h"
#include "gemm/gemm_chunk.h"
#include "gemm/lanes.h"

namespace hrmcore::HRMCORE_ISA {

constexpr std::int64_t pairs_from_tokens = 6;  // bringing the weights into pairs pays from here on
constexpr int pair_tile_rows = 8, pair_tile_tokens = 6, row_pairs = pair_tile_rows / 2;
constexpr int blocks = group_columns / 8;                                 // of eight columns
constexpr std::int64_t pair_tile_bytes = pair_tile_rows * group_columns;  // [blocks][row_pairs][2][8]
constexpr std::int64_t pair_group_bytes = pair_tile_bytes * (panel_rows / pair_tile_rows);
static_assert(chunk_groups * pair_group_bytes <= gemm_scratch_bytes, "the scratch must hold it");

// One group's cells to [tiles][blocks][row_pairs][2 rows][8 columns].
HRMCORE_INLINE void pair_group(Packing packing, const std::byte* from, std::byte* to) {
  for (int block = 0; block < blocks; ++block) {
    for (int row = 0; row < panel_rows; row += lanes) {
      vint first, second;  // four columns each
      if (packing == Packing::int8) {
        const vint flip = splat_bits(static_cast<std::int32_t>(0x80808080));
        first = load_bits(from + 2 * block * slab_bytes + 4 * row) ^ flip;
        second = load_bits(from + (2 * block + 1) * slab_bytes + 4 * row) ^ flip;
      } else {
        const vint cell = load_bits(from + block * slab_bytes + 4 * row);
        const int8x16_t offset = vdupq_n_s8(8);
        first = (vint)vsubq_s8((int8x16_t)low_nibbles(cell), offset);
        second = (vint)vsubq_s8((int8x16_t)high_nibbles(cell), offset);
      }
      std::byte* pair = to + row / pair_tile_rows * pair_tile_bytes +
                        (block * row_pairs + row % pair_tile_rows / 2) * std::int64_t{sizeof(vint)};
      vst1q_s32(reinterpret_cast<std::int32_t*>(pair), vzip1q_s32((int32x4_t)first, (int32x4_t)second));
      vst1q_s32(reinterpret_cast<std::int32_t*>(pair) + lanes,
                vzip2q_s32((int32x4_t)first, (int32x4_t)second));
    }
  }
}

// Two halves of sums: two rows of one token, then of the other.
HRMCORE_INLINE float32x4_t load_pair(const float* first, const float* second) {
  return vcombine_f32(vld1_f32(first), vld1_f32(second));
}

// Rows of one tile by `pairs` pairs of tokens, the last of which may be one token twice.
template <int pairs>
[[gnu::noinline]] void pair_tile(const GemmChunk& c, const std::byte* w, const std::byte* scales,
                                 std::int64_t scales_step, const std::byte* x, float* out,
                                 std::int64_t tokens) {
  const std::byte* rows[2 * pairs];
  float* outs[2 * pairs];
  for (int t = 0; t < 2 * pairs; ++t) {
    const std::int64_t token = t < tokens ? t : tokens - 1;
    rows[t] = x + token * c.x_row_bytes;
    outs[t] = out + token * c.out_stride;
  }
  float32x4_t sums[pairs][row_pairs];
#pragma GCC unroll 4
  for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 4
    for (int r = 0; r < row_pairs; ++r)
      sums[p][r] = c.accumulate ? load_pair(outs[2 * p] + 2 * r, outs[2 * p + 1] + 2 * r) : vdupq_n_f32(0);
  }
  for (std::int64_t group = 0; group < c.groups; ++group, w += pair_group_bytes, scales += scales_step) {
    const auto at = [&](int t) __attribute__((always_inline)) {
      return reinterpret_cast<const QuantGroup*>(rows[t]) + group;
    };
    int32x4_t dots[pairs][row_pairs] = {};
#pragma GCC unroll 4
    for (int block = 0; block < blocks; ++block) {
      int8x16_t weight[row_pairs];
#pragma GCC unroll 4
      for (int r = 0; r < row_pairs; ++r)
        weight[r] = vld1q_s8(reinterpret_cast<const std::int8_t*>(w) + (block * row_pairs + r) * 16);
#pragma GCC unroll 4
      for (int p = 0; p < pairs; ++p) {
        const int8x16_t value =
            vcombine_s8(vld1_s8(at(2 * p)->q + 8 * block), vld1_s8(at(2 * p + 1)->q + 8 * block));
#pragma GCC unroll 4
        for (int r = 0; r < row_pairs; ++r) dots[p][r] = vmmlaq_s32(dots[p][r], value, weight[r]);
      }
    }
    const auto* stored = reinterpret_cast<const bf16*>(scales);
    const float32x4_t low = (float32x4_t)load(stored), high = (float32x4_t)load(stored + lanes);
    const float32x4_t scale[row_pairs] = {vcombine_f32(vget_low_f32(low), vget_low_f32(low)),
                                          vcombine_f32(vget_high_f32(low), vget_high_f32(low)),
                                          vcombine_f32(vget_low_f32(high), vget_low_f32(high)),
                                          vcombine_f32(vget_high_f32(high), vget_high_f32(high))};
#pragma GCC unroll 4
    for (int p = 0; p < pairs; ++p) {
      const float32x4_t x_scale =
          vcombine_f32(vdup_n_f32(at(2 * p)->scale), vdup_n_f32(at(2 * p + 1)->scale));
#pragma GCC unroll 4
      for (int r = 0; r < row_pairs; ++r)
        sums[p][r] = vfmaq_f32(sums[p][r], vcvtq_f32_s32(dots[p][r]), vmulq_f32(scale[r], x_scale));
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 4
    for (int r = 0; r < row_pairs; ++r) {
      // In this order: of one token twice, both halves are the same.
      vst1_f32(outs[2 * p] + 2 * r, vget_low_f32(sums[p][r]));
      vst1_f32(outs[2 * p + 1] + 2 * r, vget_high_f32(sums[p][r]));
    }
  }
}

// As multiply_chunk for int8 and int4; `scratch` has gemm_scratch_bytes.
HRMCORE_INLINE void multiply_pairs(Packing packing, const GemmChunk& c, std::byte* scratch) {
  const std::int64_t bytes = group_bytes(packing);
  for (std::int64_t group = 0; group < c.groups; ++group)
    pair_group(packing, c.weights + group * bytes, scratch + group * pair_group_bytes);
  for (std::int64_t token = 0; token < c.tokens; token += pair_tile_tokens) {
    const std::int64_t tokens = c.tokens - token < pair_tile_tokens ? c.tokens - token : pair_tile_tokens;
    const std::byte* x = c.x + token * c.x_row_bytes;
    for (std::int64_t row = 0; row < panel_rows; row += pair_tile_rows) {
      const std::byte* w = scratch + row / pair_tile_rows * pair_tile_bytes;
      const std::byte* scales = c.weights + bytes - scale_bytes + 2 * row;
      float* out = c.out + token * c.out_stride + row;
      if (tokens > 4) {
        pair_tile<3>(c, w, scales, bytes, x, out, tokens);
      } else if (tokens > 2) {
        pair_tile<2>(c, w, scales, bytes, x, out, tokens);
      } else {
        pair_tile<1>(c, w, scales, bytes, x, out, tokens);
      }
    }
  }
}

}  // namespace hrmcore::HRMCORE_ISA

#endif
