// What the engine's kernels need beyond core/simd.h: a fused multiply-add that is always fused where the
// instruction set has one (so that two ways of cutting a product give the same bits), and the norm of a row.
#pragma once

#if defined(HRMCORE_X86)
#include <immintrin.h>
#endif

#include "core/simd.h"

namespace hrmcore::HRMCORE_ISA {

HRMCORE_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(HRMCORE_AVX512)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(HRMCORE_AVX2)
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

#if defined(HRMCORE_AVX512_BF16)
HRMCORE_INLINE void put_pair(vfloat low, vfloat high, std::byte* to) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  __builtin_memcpy(to, &both, sizeof(both));
}
#endif

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
