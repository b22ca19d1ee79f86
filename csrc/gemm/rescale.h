// A chunk of a panel of int8 or int4 weights on its way to one scale for each row: the largest magnitude of its
// groups' (an int4 has negative scales, too), where the largest weight is 127. What a group's scale is of the row's,
// its share, is rounded to 15 bits, and the weights times that to int8.
//
// Takes 8 (int8) or 9 (int4) instructions for a vector of weights, of four columns of its lanes' rows. For kernels of
// sets with vectors of 256 bits or more.
#pragma once

#include "gemm/lanes.h"
#include "gemm/row_tiles.h"
#include "gemm/weight_layout.h"

namespace hrmcore::HRMCORE_ISA {

// Of each group and row, times 2^15, four times: for the columns of a cell in 16 bits, in the order of Halves.
struct alignas(64) RowShares {
  std::int16_t of[tile_chunk_groups][panel_rows][4];
};

// Sixteen bits for each of four columns: of rows 0, 1, 4, 5, 8, 9, ... and of rows 2, 3, 6, 7, ...
struct Halves {
  vint low, high;
};

constexpr std::int64_t slabs_of(Packing packing) { return packing == Packing::int8 ? 8 : 4; }

// (The full masks because of GCC 12's false warning about the plain intrinsics.)
HRMCORE_INLINE Halves unpack_twice(vint words) {
#if defined(HRMCORE_AVX512)
  const __m512i w = (__m512i)words;
  return {(vint)_mm512_maskz_unpacklo_epi32(0xffff, w, w), (vint)_mm512_maskz_unpackhi_epi32(0xffff, w, w)};
#else
  const __m256i w = (__m256i)words;
  return {(vint)_mm256_unpacklo_epi32(w, w), (vint)_mm256_unpackhi_epi32(w, w)};
#endif
}

// Signed bytes to 16 bits.
HRMCORE_INLINE Halves unpack(vint bytes) {
#if defined(HRMCORE_AVX512)
  const __m512i b = (__m512i)bytes, zero = _mm512_setzero_si512();
  return {(vint)_mm512_srai_epi16(_mm512_unpacklo_epi8(zero, b), 8),
          (vint)_mm512_srai_epi16(_mm512_unpackhi_epi8(zero, b), 8)};
#else
  const __m256i b = (__m256i)bytes, zero = _mm256_setzero_si256();
  return {(vint)_mm256_srai_epi16(_mm256_unpacklo_epi8(zero, b), 8),
          (vint)_mm256_srai_epi16(_mm256_unpackhi_epi8(zero, b), 8)};
#endif
}

// The inverse of unpack: both work within 16 bytes.
HRMCORE_INLINE vint pack(const Halves& h) {
#if defined(HRMCORE_AVX512)
  return (vint)_mm512_packs_epi16((__m512i)h.low, (__m512i)h.high);
#else
  return (vint)_mm256_packs_epi16((__m256i)h.low, (__m256i)h.high);
#endif
}

// round(a b / 2^15) of 16 bits each.
HRMCORE_INLINE vint multiply_shares(vint a, vint b) {
#if defined(HRMCORE_AVX512)
  return (vint)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#else
  return (vint)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#endif
}

template <Packing packing>
HRMCORE_INLINE void find_shares(const std::byte* chunk, std::int64_t groups, RowShares& shares,
                                float* scales) {
  // An int4 enters as 16 times itself, at most 128.
  constexpr float worth = packing == Packing::int8 ? 1.0f : 8.0f / 127,
                  whole = packing == Packing::int8 ? 32768.0f : 32512.0f;
  for (std::int64_t row = 0; row < panel_rows; row += lanes) {
    vfloat of_group[tile_chunk_groups], top = splat(1e-30f);
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::byte* group = chunk + g * group_bytes(packing) + slabs_of(packing) * slab_bytes;
      of_group[g] = load(reinterpret_cast<const bf16*>(group) + row);
      top = max(top, (vfloat)((vint)of_group[g] & 0x7fffffff));
    }
    store(scales + row, top * worth);
    const vfloat inverse = whole / top;
    for (std::int64_t g = 0; g < groups; ++g) {
      const vint share = round_product(of_group[g], inverse);
      const vint word = (share > 32767 ? splat_bits(32767) : share) & 0xffff;
      const Halves both = unpack_twice(word | word << 16);
      __builtin_memcpy(shares.of[g][row], &both, sizeof(both));
    }
  }
}

HRMCORE_INLINE Halves load_shares(const RowShares& shares, std::int64_t group, std::int64_t row) {
  Halves both;
  __builtin_memcpy(&both, shares.of[group][row], sizeof(both));
  return both;
}

// A vector of a slab: put(0, weights), and for int4, whose cells hold eight columns, put(1, those of the last four).
template <Packing packing, class Put>
HRMCORE_INLINE void rescale(const std::byte* cells, const Halves& shares, const Put& put) {
  const auto rescaled = [&](vint bytes) __attribute__((always_inline)) {
    const Halves h = unpack(bytes ^ static_cast<std::int32_t>(0x80808080));
    return Halves{multiply_shares(h.low, shares.low), multiply_shares(h.high, shares.high)};
  };
  const vint bytes = load_bits(cells);
  if constexpr (packing == Packing::int8) {
    put(0, rescaled(bytes));
  } else {
    constexpr auto high_nibble = static_cast<std::int32_t>(0xf0f0f0f0);
    put(0, rescaled((bytes << 4) & high_nibble));
    put(1, rescaled(bytes & high_nibble));
  }
}

}  // namespace hrmcore::HRMCORE_ISA
