// What the engine's kernels need beyond core/simd.h: a fused multiply-add that is always fused where the
// instruction set has one (so that two ways of cutting a product give the same bits), the four-way byte
// product, and the norm of a row.
#pragma once

#if defined(HRMCORE_X86)
#include <immintrin.h>
#endif

#include "core/simd.h"

namespace hrmcore::HRMCORE_ISA {

HRMCORE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(HRMCORE_ISA_avx512) || defined(HRMCORE_ISA_vnni) || defined(HRMCORE_ISA_amx)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(HRMCORE_ISA_avx2)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(HRMCORE_ARM64)
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// round(a * b) where |a * b| < 2^22: adding 1.5 * 2^23 rounds to an integer, in the low bits.
HRMCORE_INLINE vint round_product(vfloat a, vfloat b) {
  return (vint)fma(a, b, splat(12582912.0f)) - 0x4b400000;
}

HRMCORE_INLINE vint splat_bits(std::int32_t x) { return x + vint{}; }

HRMCORE_INLINE vint load_bits(const void* p) {
  vint v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

HRMCORE_INLINE std::int32_t load_cell(const void* p) {
  std::int32_t cell;
  __builtin_memcpy(&cell, p, sizeof(cell));
  return cell;
}

HRMCORE_INLINE vfloat to_float(vint v) { return __builtin_convertvector(v, vfloat); }

// The two columns of a bf16 cell.
HRMCORE_INLINE vfloat low_half(vint cell) { return (vfloat)(cell << 16); }
HRMCORE_INLINE vfloat high_half(vint cell) { return (vfloat)(cell & splat_bits(-65536)); }

// The two halves of each byte.
HRMCORE_INLINE vint low_nibbles(vint cell) { return cell & 0x0f0f0f0f; }
HRMCORE_INLINE vint high_nibbles(vint cell) {
#if defined(HRMCORE_ARM64)
  return (vint)vshrq_n_u8((uint8x16_t)cell, 4);
#else
  return (cell >> 4) & 0x0f0f0f0f;
#endif
}

// Whether dot4 takes w as signed bytes: Arm got a product of unsigned and signed ones late.
#if defined(HRMCORE_ARM64) && !defined(HRMCORE_ISA_i8mm)
constexpr bool signed_weights = true;
#else
constexpr bool signed_weights = false;
#endif

// acc + the sum over the four bytes of each lane of w times signed a in [-127, 127], exact. w is unsigned, or
// under signed_weights signed.
HRMCORE_INLINE vint dot4(vint acc, vint w, vint a) {
#if defined(HRMCORE_ISA_vnni) || defined(HRMCORE_ISA_amx)
  return (vint)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
#elif defined(HRMCORE_ISA_avx512)
  const __m512i even_a = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)a, 8), 8);
  const __m512i odd_a = _mm512_srai_epi16((__m512i)a, 8);
  const __m512i even_w = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255));
  const __m512i odd_w = _mm512_srli_epi16((__m512i)w, 8);
  return acc + (vint)_mm512_madd_epi16(even_w, even_a) + (vint)_mm512_madd_epi16(odd_w, odd_a);
#elif defined(HRMCORE_ISA_avx2)
  const __m256i even_a = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a, 8), 8);
  const __m256i odd_a = _mm256_srai_epi16((__m256i)a, 8);
  const __m256i even_w = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(255));
  const __m256i odd_w = _mm256_srli_epi16((__m256i)w, 8);
  return acc + (vint)_mm256_madd_epi16(even_w, even_a) + (vint)_mm256_madd_epi16(odd_w, odd_a);
#elif defined(HRMCORE_ISA_i8mm)
  return (vint)vusdotq_s32((int32x4_t)acc, (uint8x16_t)w, (int8x16_t)a);
#elif defined(HRMCORE_ISA_dotprod)
  return (vint)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)a);
#elif defined(HRMCORE_ARM64)
  // Two products fit 16 bits: 2 * 128 * 127 < 2^15.
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)a));
  const int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)a);
  return (vint)vpadalq_s16((int32x4_t)acc, vpaddq_s16(low, high));
#elif defined(HRMCORE_X86)
  const __m128i even_a = _mm_srai_epi16(_mm_slli_epi16((__m128i)a, 8), 8);
  const __m128i odd_a = _mm_srai_epi16((__m128i)a, 8);
  const __m128i even_w = _mm_and_si128((__m128i)w, _mm_set1_epi16(255));
  const __m128i odd_w = _mm_srli_epi16((__m128i)w, 8);
  return acc + (vint)_mm_madd_epi16(even_w, even_a) + (vint)_mm_madd_epi16(odd_w, odd_a);
#else
  for (int byte = 0; byte < 4; ++byte) {
    acc += ((w >> (8 * byte)) & 255) * ((a << (24 - 8 * byte)) >> 24);
  }
  return acc;
#endif
}

// One row of a norm: x, or with `add` x + add, which then goes to `sum` and is what the norm reads.
struct NormalisedRow {
  const float* x;
  vfloat scale;  // 1 / rms
};

template <class Args>
HRMCORE_INLINE NormalisedRow normalised_row(const Args& args, std::int64_t row) {
  const float* x = args.x + row * args.stride;
  vfloat squares[4] = {};  // four chains: one would wait for its own additions
  for (std::int64_t c = 0; c < args.stride; c += 4 * lanes) {
    for (int i = 0; i < 4; ++i) {
      vfloat v = load(x + c + i * lanes);
      if (args.add != nullptr) {
        v += load(args.add + row * args.stride + c + i * lanes);
        store(args.sum + row * args.stride + c + i * lanes, v);
      }
      squares[i] = fma(v, v, squares[i]);
    }
  }
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return {args.add != nullptr ? args.sum + row * args.stride : x,
          splat(1.0f / __builtin_sqrtf(total / static_cast<float>(args.width) + args.eps))};
}

}  // namespace hrmcore::HRMCORE_ISA
