// The exact integer products of a group of 32 columns: unsigned bytes of weights times signed bytes of
// activations, four columns of each lane's row at a time.
//
// With VNNI four products are one instruction. Before it, the instruction that multiplies bytes adds two
// products in 16 bits, with saturation; it is exact as long as the weights are nibbles: eight cells of two
// products of at most 15 * 127 make 30,480. So nibbles take 2 instructions a cell and vector, bytes 4, as
// nibbles of 16 and of 1; widening bytes to 16 bits took bytes and nibbles 4 and the unpacking of each activation.
#pragma once

#include "gemm/lanes.h"
#include "gemm/weight_layout.h"

namespace hrmcore::HRMCORE_ISA {

// Whether weights are signed bytes here: Arm got a product of unsigned and signed ones late.
#if defined(HRMCORE_ARM64) && !defined(HRMCORE_ISA_i8mm)
constexpr bool signed_weights = true;
#else
constexpr bool signed_weights = false;
#endif

// Whether activations in tiles are x + 128: where the product wants one operand unsigned, that is the
// activations, since weights can be summed on their way for what the 128 adds (byte_gemm.cpp).
#if defined(HRMCORE_VNNI) && !defined(HRMCORE_ISA_amx)
constexpr bool unsigned_tiles = true;
#else
constexpr bool unsigned_tiles = false;
#endif

constexpr int most_cells = group_columns / 4;  // added to one Dots

#if defined(HRMCORE_X86) && !defined(HRMCORE_VNNI)

// Pairs of 16-bit sums: acc + both products of each half of a lane.
HRMCORE_INLINE vint add_pairs(vint acc, vint w, vint a) {
#if defined(HRMCORE_AVX512)
  return (vint)_mm512_add_epi16((__m512i)acc, _mm512_maddubs_epi16((__m512i)w, (__m512i)a));
#elif defined(HRMCORE_AVX2)
  return (vint)_mm256_add_epi16((__m256i)acc, _mm256_maddubs_epi16((__m256i)w, (__m256i)a));
#else
  return (vint)_mm_add_epi16((__m128i)acc, _mm_maddubs_epi16((__m128i)w, (__m128i)a));
#endif
}

HRMCORE_INLINE vint sum_pairs(vint pairs) {
#if defined(HRMCORE_AVX512)
  return (vint)_mm512_madd_epi16((__m512i)pairs, _mm512_set1_epi16(1));
#elif defined(HRMCORE_AVX2)
  return (vint)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1));
#else
  return (vint)_mm_madd_epi16((__m128i)pairs, _mm_set1_epi16(1));
#endif
}

template <bool nibbles>
struct Dots {
  vint low, high;

  HRMCORE_METHOD void begin(vint) { low = high = vint{}; }
  HRMCORE_METHOD void add(vint w, vint a) {
    if constexpr (nibbles) {
      low = add_pairs(low, w, a);
    } else {
      low = add_pairs(low, low_nibbles(w), a);
      high = add_pairs(high, high_nibbles(w), a);
    }
  }
  HRMCORE_METHOD vint sum(vint start) const {
    return start + (nibbles ? sum_pairs(low) : sum_pairs(low) + (sum_pairs(high) << 4));
  }
};

#else

// acc + the sum over the four bytes of each lane of w times signed a in [-127, 127]. w is unsigned, or under
// signed_weights signed. (Tiles swap them: there a is the weights.)
HRMCORE_INLINE vint dot4(vint acc, vint w, vint a) {
#if defined(HRMCORE_AVX512)
  return (vint)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#elif defined(HRMCORE_ISA_avxvnni)
  return (vint)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)a);
#elif defined(HRMCORE_ISA_i8mm)
  return (vint)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, (int8x16_t)a);
#elif defined(HRMCORE_ISA_dotprod)
  return (vint)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)a);
#elif defined(HRMCORE_ARM64)
  // Two products fit 16 bits: 2 * 128 * 127 < 2^15.
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)a));
  const int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)a);
  return (vint)vpadalq_s16((int32x4_t)acc, vpaddq_s16(low, high));
#else
  for (int byte = 0; byte < 4; ++byte) {
    acc += ((w >> (8 * byte)) & 255) * ((a << (24 - 8 * byte)) >> 24);
  }
  return acc;
#endif
}

template <bool nibbles>
struct Dots {
  vint all;

  HRMCORE_METHOD void begin(vint start) { all = start; }
  HRMCORE_METHOD void add(vint w, vint a) { all = dot4(all, w, a); }
  HRMCORE_METHOD vint sum(vint) const { return all; }
};

#endif

}  // namespace hrmcore::HRMCORE_ISA
