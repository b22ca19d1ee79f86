// Every asm statement of the kernels, each with its host meaning beside it: what it computes when the
// emulator of csrc/emulator runs the kernel. Fragment layouts are those of the PTX ISA 8.x, section "Matrix
// multiply-accumulate operation using mma instruction", stated here independently of any kernel or weight
// packer.
//
// Not in the host meaning: the tensor core's own rounding and order of summation (here: float32, k
// ascending), the memory model's weakness, time.
#pragma once

#include <cstdint>
#include <type_traits>

// The caller's place in the source, a last parameter of everything that the emulator may find fault with.
#if defined(__CUDACC__)
#define HRMCORE_SITE
#define HRMCORE_PASS_SITE
#else
#define HRMCORE_SITE , ::hrmcore::emulator::Site site = ::hrmcore::emulator::here()
#define HRMCORE_PASS_SITE , site
#endif

namespace hrmcore::cuda {

struct bf16 {
  std::uint16_t bits;
};

// IEEE's half precision: 11 significant bits, up to 65504.
struct f16 {
  std::uint16_t bits;
};

// Two bf16, or two f16, in one register, the first in the low half.
using bf16x2 = std::uint32_t;
using f16x2 = std::uint32_t;

// Round to nearest even; a NaN becomes the canonical NaN.
__device__ __forceinline__ bf16 to_bf16(float x) {
#if defined(__CUDACC__)
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const std::uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

__device__ __forceinline__ bf16x2 to_bf16x2(float low, float high) {
#if defined(__CUDACC__)
  bf16x2 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return to_bf16(low).bits | static_cast<std::uint32_t>(to_bf16(high).bits) << 16;
#endif
}

// Round to nearest even; too large a number becomes infinite.
__device__ __forceinline__ f16 to_f16(float x) {
#if defined(__CUDACC__)
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const std::uint32_t sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(x) & 0x7fffffff;
  if (x != x) return {0x7fff};
  if (bits >= 0x477ff000) return {static_cast<std::uint16_t>(sign | 0x7c00)};  // 65520 and more
  if (bits < 0x38800000) {  // below 2^-14 a unit is 2^-24: float32's own rounding in the last place of a half
    const float shifted = __uint_as_float(bits) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000))};
  }
  const std::uint32_t even = bits - 0x38000000 + 0xfff + (bits >> 13 & 1);
  return {static_cast<std::uint16_t>(sign | even >> 13)};
#endif
}

__device__ __forceinline__ f16x2 to_f16x2(float low, float high) {
#if defined(__CUDACC__)
  f16x2 result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return to_f16(low).bits | static_cast<std::uint32_t>(to_f16(high).bits) << 16;
#endif
}

__device__ __forceinline__ float from_f16(f16 x) {
#if defined(__CUDACC__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // As float32 with an exponent 112 too small, which a product with 2^112 mends, subnormal numbers too.
  const float magnitude = __uint_as_float(rest << 13) * 0x1p112f;
  return sign != 0 ? -magnitude : magnitude;
#endif
}

__device__ __forceinline__ float half_of_f16(f16x2 pair, int which) {
  return from_f16({static_cast<std::uint16_t>(which == 0 ? pair : pair >> 16)});
}

// The device's quick functions: two units in the last place, subnormal numbers taken for zero. On the host they are
// exact to their own.
__device__ __forceinline__ float quick_exp(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  return std::exp(x);
#endif
}
// 2^x; of minus infinity, zero.
__device__ __forceinline__ float quick_exp2(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}
__device__ __forceinline__ float quick_log2(float x) {
#if defined(__CUDACC__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::log2(x);
#endif
}
__device__ __forceinline__ float quick_log(float x) { return quick_log2(x) * 0.693147181f; }
__device__ __forceinline__ float quick_reciprocal(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}
__device__ __forceinline__ float quick_reciprocal_root(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / std::sqrt(x);
#endif
}

// Four bytes of x (0 to 3) and y (4 to 7), chosen by the low four hexadecimal digits of the selector.
__device__ __forceinline__ std::uint32_t byte_permute(std::uint32_t x, std::uint32_t y,
                                                      std::uint32_t selector) {
#if defined(__CUDACC__)
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(selector));
  return result;
#else
  const std::uint64_t both = std::uint64_t{y} << 32 | x;
  std::uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned byte = selector >> (4 * i) & 7;
    result |= static_cast<std::uint32_t>(both >> (8 * byte) & 0xff) << (8 * i);
  }
  return result;
#endif
}

// x, of which the compiler knows nothing: it cannot compute what follows from it any earlier.
__device__ __forceinline__ int opaque(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The bits of x under a mask, and others beside: one instruction, which the compiler makes of it only when told.
__device__ __forceinline__ std::uint32_t masked(std::uint32_t x, std::uint32_t mask, std::uint32_t others) {
#if defined(__CUDACC__)
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(others));
  return result;
#else
  return (x & mask) | others;
#endif
}

// x * y + z of each f16, rounded once.
__device__ __forceinline__ f16x2 multiply_add(f16x2 x, f16x2 y, f16x2 z) {
#if defined(__CUDACC__)
  f16x2 result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  return result;
#else
  // A product of two f16 is exact in float32; the sum is rounded twice, alike where it is exact.
  f16x2 result = 0;
  for (int i = 0; i < 2; ++i) {
    result |= static_cast<f16x2>(to_f16(half_of_f16(x, i) * half_of_f16(y, i) + half_of_f16(z, i)).bits)
              << (16 * i);
  }
  return result;
#endif
}

// The same of bfloat16.
__device__ __forceinline__ bf16x2 multiply_add_bf16(bf16x2 x, bf16x2 y, bf16x2 z) {
#if defined(__CUDACC__)
  bf16x2 result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  return result;
#else
  const auto half = [](bf16x2 pair, int which) {
    return __uint_as_float((which == 0 ? pair << 16 : pair) & 0xffff0000u);
  };
  // As above: rounded twice, alike where the product, or the sum, is exact in float32.
  return to_bf16x2(half(x, 0) * half(y, 0) + half(z, 0), half(x, 1) * half(y, 1) + half(z, 1));
#endif
}

#if !defined(__CUDACC__)
namespace host {

template <class T>
float half_of(std::uint32_t pair, int which) {
  if constexpr (std::is_same_v<T, f16>) return half_of_f16(pair, which);
  return __uint_as_float((which == 0 ? pair << 16 : pair) & 0xffff0000u);
}

struct MmaInputs {
  const float* c;
  const std::uint32_t *a, *b;
};

// Lane t holds, with g = t / 4 and h = t % 4: A rows g and g + 8, columns 2h, 2h + 1 and 8 more; B rows 2h,
// 2h + 1 and 8 more, column g; C rows g and g + 8, columns 2h and 2h + 1.
template <class T>
void mma(const void* const (&in)[32], void* const (&out)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& fragments = *static_cast<const MmaInputs*>(in[lane]);
    const int g = lane / 4, h = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * h + i] = half_of<T>(fragments.a[0], i);
      a[g + 8][2 * h + i] = half_of<T>(fragments.a[1], i);
      a[g][2 * h + 8 + i] = half_of<T>(fragments.a[2], i);
      a[g + 8][2 * h + 8 + i] = half_of<T>(fragments.a[3], i);
      b[2 * h + i][g] = half_of<T>(fragments.b[0], i);
      b[2 * h + 8 + i][g] = half_of<T>(fragments.b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const float* c = static_cast<const MmaInputs*>(in[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      static_cast<float*>(out[lane])[i] = sum;
    }
  }
}

// Lane t's address is that of row t % 8 of matrix t / 8; register m of lane t gets from matrix m elements 2(t
// % 4) and the next of row t / 4, or, transposed, of column t / 4.
template <bool transposed>
void ldmatrix(const void* const (&in)[32], void* const (&out)[32]) {
  std::uint16_t elements[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    __builtin_memcpy(elements[lane / 8][lane % 8], *static_cast<const void* const*>(in[lane]), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int across = lane / 4, along = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const auto& e = elements[m];
      const std::uint32_t low = transposed ? e[along][across] : e[across][along];
      const std::uint32_t high = transposed ? e[along + 1][across] : e[across][along + 1];
      static_cast<std::uint32_t*>(out[lane])[m] = low | high << 16;
    }
  }
}

}  // namespace host
#endif

// C (16 x 8, float32) += A (16 x 16, bf16, by rows) B (16 x 8, bf16, by columns).
__device__ __forceinline__ void mma_bf16(float (&c)[4], const bf16x2 (&a)[4],
                                         const bf16x2 (&b)[2] HRMCORE_SITE) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const host::MmaInputs inputs{c, a, b};
  float sums[4];
  emulator::warp_operation("mma.sync", 0xffffffffu, &inputs, sums, host::mma<bf16>, site);
  for (int i = 0; i < 4; ++i) c[i] = sums[i];
#endif
}

// The same of f16.
__device__ __forceinline__ void mma_f16(float (&c)[4], const f16x2 (&a)[4],
                                        const f16x2 (&b)[2] HRMCORE_SITE) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const host::MmaInputs inputs{c, a, b};
  float sums[4];
  emulator::warp_operation("mma.sync", 0xffffffffu, &inputs, sums, host::mma<f16>, site);
  for (int i = 0; i < 4; ++i) c[i] = sums[i];
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; `row` is this lane's row, 16-byte aligned.
template <bool transposed>
__device__ __forceinline__ void ldmatrix(std::uint32_t (&fragments)[4], const bf16* row HRMCORE_SITE) {
#if defined(__CUDACC__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulator::shared_access(row, 16, false, site);
  emulator::warp_operation(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &row, fragments,
                           host::ldmatrix<transposed>, site);
#endif
}

// Starts copying 16 bytes from global to shared memory; of those, the first `filled` are read and the rest
// are zeros.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int filled HRMCORE_SITE) {
#if defined(__CUDACC__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(filled)
               : "memory");
#else
  emulator::copy_async(shared, global, 16, static_cast<std::size_t>(filled), site);
#endif
}

// The same under a condition: all 16 bytes, or nothing is copied at all.
__device__ __forceinline__ void copy_async_if(bool copied, void* shared, const void* global HRMCORE_SITE) {
#if defined(__CUDACC__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{.reg .pred copied; setp.ne.b32 copied, %2, 0; @copied cp.async.cg.shared.global [%0], [%1], 16;}" ::
          "r"(address),
      "l"(global), "r"(static_cast<int>(copied))
      : "memory");
#else
  if (copied) emulator::copy_async(shared, global, 16, 16, site);
#endif
}

// The same for one 4-byte element, or for none of it and zeros instead.
template <class T>
__device__ __forceinline__ void copy_async_element(T* shared, const T* global, bool filled HRMCORE_SITE) {
  static_assert(sizeof(T) == 4);
#if defined(__CUDACC__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(filled ? 4 : 0)
               : "memory");
#else
  emulator::copy_async(shared, global, sizeof(T), filled ? sizeof(T) : 0, site);
#endif
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}

// Waits until all but the newest `groups_left` groups of this thread's copies have landed, for this thread to
// see.
template <int groups_left>
__device__ __forceinline__ void wait_for_copies(
#if !defined(__CUDACC__)
    emulator::Site site = emulator::here()
#endif
) {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#else
  emulator::wait_for_copies(groups_left, site);
#endif
}

// A barrier of every thread of a cooperative launch, its grid of one dimension, in two halves: what threads wrote
// before they arrive is seen by all that have waited. What a thread does in between may not touch what others
// write before they arrive, nor what others read after they have waited.
//
// `state` is one number in global memory, 0 before the first launch that uses it; its top bit flips whenever
// all blocks have arrived. It is read once, before the first arrival: read later, it may have flipped already.
class GridBarrier {
 public:
#if defined(__CUDACC__)
  __device__ __forceinline__ explicit GridBarrier(std::uint32_t* state) : state_(state) {
    if (threadIdx.x == 0) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(before_) : "l"(state));
  }
  __device__ __forceinline__ void arrive() const {
    __syncthreads();
    if (threadIdx.x == 0) {
      const std::uint32_t more = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
      asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(state_), "r"(more) : "memory");
    }
  }
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == 0) {
      std::uint32_t now;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(state_) : "memory");
      } while (((before_ ^ now) & 0x80000000u) == 0);
      before_ ^= 0x80000000u;
    }
    __syncthreads();
  }

 private:
  std::uint32_t* state_;
  std::uint32_t before_ = 0;
#else
  explicit GridBarrier(std::uint32_t*, emulator::Site site = emulator::here()) {
    emulator::grid_state_read(site);
  }
  void arrive(emulator::Site site = emulator::here()) const { emulator::grid_arrive(site); }
  void wait(emulator::Site site = emulator::here()) const { emulator::grid_wait(site); }
#endif
};

}  // namespace hrmcore::cuda
