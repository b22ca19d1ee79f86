// The SIMD type of the instruction set that this file is being compiled for, on GCC's and Clang's vector
// extensions. Everything here lives in the instruction set's own namespace and is inlined by force (see
// cmake/check_isolation.py).
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/isa.h"
#include "core/tensor.h"
#include "core/threads.h"

// What the instruction sets have. 256-bit vectors: HRMCORE_AVX2; 512-bit ones: HRMCORE_AVX512.
#if defined(HRMCORE_ISA_bf16) || defined(HRMCORE_ISA_amx)
#define HRMCORE_AVX512_BF16 1
#endif
#if defined(HRMCORE_ISA_avx512) || defined(HRMCORE_ISA_vnni) || defined(HRMCORE_AVX512_BF16)
#define HRMCORE_AVX512 1
#endif
#if defined(HRMCORE_ISA_avx2) || defined(HRMCORE_ISA_avxvnni)
#define HRMCORE_AVX2 1
#endif
#if defined(HRMCORE_ISA_avxvnni) || (defined(HRMCORE_AVX512) && !defined(HRMCORE_ISA_avx512))
#define HRMCORE_VNNI 1
#endif

#if defined(HRMCORE_AVX2) || defined(HRMCORE_AVX512)
#include <immintrin.h>
#endif
#if defined(HRMCORE_ARM64)
#include <arm_neon.h>
#endif

#define HRMCORE_METHOD inline __attribute__((always_inline))
#define HRMCORE_INLINE static inline __attribute__((always_inline))

namespace hrmcore::HRMCORE_ISA {

#if defined(HRMCORE_AVX512)
constexpr int lanes = 16;
#elif defined(HRMCORE_AVX2)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(lanes * 4)));
typedef std::int32_t vint __attribute__((vector_size(lanes * 4)));
typedef std::uint32_t vuint __attribute__((vector_size(lanes * 4)));
typedef std::uint16_t vhalf __attribute__((vector_size(lanes * 2)));
typedef std::int8_t vbyte __attribute__((vector_size(lanes)));

struct bf16 {
  std::uint16_t bits;
};

HRMCORE_INLINE vfloat splat(float x) { return x - vfloat{}; }

HRMCORE_INLINE vfloat load(const float* p) {
  vfloat v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

HRMCORE_INLINE void store(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof(v)); }

// Halves and bytes to 32 bits. One instruction, which GCC 12 does not find for __builtin_convertvector: it
// splits the vector in two, and bytes into single elements. (The full mask because of its false warning about
// the plain intrinsic.)
HRMCORE_INLINE vuint widen(vhalf halves) {
#if defined(HRMCORE_AVX2)
  return (vuint)_mm256_cvtepu16_epi32((__m128i)halves);
#elif defined(HRMCORE_AVX512)
  return (vuint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);
#elif defined(HRMCORE_ARM64)
  return (vuint)vmovl_u16((uint16x4_t)halves);
#else
  return __builtin_convertvector(halves, vuint);
#endif
}

HRMCORE_INLINE vint widen(vbyte bytes) {
#if defined(HRMCORE_AVX2)
  return (vint)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes));
#elif defined(HRMCORE_AVX512)
  return (vint)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)bytes);
#elif defined(HRMCORE_ARM64)
  std::uint32_t bits;
  __builtin_memcpy(&bits, &bytes, sizeof(bits));
  return (vint)vmovl_s16(vget_low_s16(vmovl_s8((int8x8_t)vdup_n_u32(bits))));
#else
  return __builtin_convertvector(bytes, vint);
#endif
}

HRMCORE_INLINE vfloat load(const bf16* p) {
  vhalf halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return (vfloat)(widen(halves) << 16);
}

HRMCORE_INLINE vfloat load(const std::int8_t* p) {
  vbyte bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(widen(bytes), vfloat);
}

// Round to nearest even; a NaN stays a NaN.
HRMCORE_INLINE void store(bf16* p, vfloat v) {
  const vuint u = (vuint)v;
  const vuint rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vuint nan = (u >> 16) | 0x40;
  const vuint is_nan = (vuint)(v != v);
  const vhalf h = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vhalf);
  __builtin_memcpy(p, &h, sizeof(h));
}

// The last, incomplete vector of a row: missing lanes read as zero and are not written.
template <class T>
HRMCORE_INLINE vfloat load_part(const T* p, std::int64_t count) {
  T buffer[lanes] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
HRMCORE_INLINE void store_part(T* p, vfloat v, std::int64_t count) {
  T buffer[lanes];
  store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// The first lane joined with all others, by halves. Shuffles, since a loop over an array waits for its
// stores.
template <int width, class Join, int... lane>
HRMCORE_INLINE float fold(vfloat v, const Join& join, std::integer_sequence<int, lane...> every) {
  const vfloat joined = join(v, __builtin_shufflevector(v, v, ((lane + width) % lanes)...));
  if constexpr (width == 1) {
    return joined[0];
  } else {
    return fold<width / 2>(joined, join, every);
  }
}

HRMCORE_INLINE float sum(vfloat v) {
  const auto add = [](vfloat a, vfloat b) __attribute__((always_inline)) { return a + b; };
  return fold<lanes / 2>(v, add, std::make_integer_sequence<int, lanes>());
}

HRMCORE_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }

HRMCORE_INLINE float max(vfloat v) {
  const auto greater = [](vfloat a, vfloat b) __attribute__((always_inline)) { return max(a, b); };
  return fold<lanes / 2>(v, greater, std::make_integer_sequence<int, lanes>());
}

HRMCORE_INLINE vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }

// e^x to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 polynomial in r. Saturates instead of
// overflowing, flushes to zero below -87.3 (no denormals), and passes a NaN on.
HRMCORE_INLINE vfloat exp(vfloat x) {
  const vfloat clamped = min(max(x, splat(-87.33654f)), splat(88.37626f));
  const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = clamped * 1.44269504f + magic;
  const vfloat n = shifted - magic;
  const vfloat r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vfloat p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vint exponent = ((vint)shifted - 0x4b400000) << 23;
  const vfloat y = (vfloat)((vint)p + exponent);
  const vfloat flushed = x < -87.33654f ? vfloat{} : y;
  return x == x ? flushed : x;
}

HRMCORE_INLINE vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

// Calls f(column, load, store) over one row, the last vector in part: f sees loads and stores of the right
// length.
template <class F>
HRMCORE_INLINE void for_columns(std::int64_t width, const F& f) {
  std::int64_t column = 0;
  for (; column + lanes <= width; column += lanes) {
    f(
        column, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, vfloat v) __attribute__((always_inline)) { store(p, v); });
  }
  if (const std::int64_t rest = width - column; rest > 0) {
    f(
        column, [rest](const auto* p) __attribute__((always_inline)) { return load_part(p, rest); },
        [rest](auto* p, vfloat v) __attribute__((always_inline)) { store_part(p, v, rest); });
  }
}

// Rows of one block of work: enough elements that a second thread is worth waking for the next block. Depends
// on the shape alone, so the thread count changes no bits.
HRMCORE_INLINE std::int64_t rows_of_block(std::int64_t row_elements) {
  constexpr std::int64_t block_elements = 16384;
  return row_elements < block_elements ? block_elements / row_elements : 1;
}

// Runs f(begin, end) over blocks of [0, count); see run_blocks.
template <class F>
HRMCORE_INLINE void parallel_for(std::int64_t count, std::int64_t grain, const F& f) {
  run_blocks(
      count, grain,
      [](void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
HRMCORE_INLINE void with_element(DType dtype, const F& f) {
  if (dtype == DType::bf16) {
    f(static_cast<bf16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

}  // namespace hrmcore::HRMCORE_ISA
