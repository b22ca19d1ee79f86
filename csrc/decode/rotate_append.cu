#include "decode/rotate_append.h"

#include "core/cuda.cuh"
#include "decode/int8_page.cuh"

// A block a token and one of q, k and v; a thread owns n channels of the lower half of a head and their partners in the
// upper, of values too. For an int8 cache n is 4: the largest of 32 channels, or of a head, is found by lanes that are
// neighbours.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 128;

enum Operand { query, key, value };

// n channels and their partners, of the place `at` of a row.
template <int n>
__device__ __forceinline__ void put(bf16* at, int half, const Floats<n>& low, const Floats<n>& high) {
  store<n>(at, low);
  store<n>(at + half, high);
}

template <int n>
__device__ __forceinline__ void turn(Floats<n>& low, Floats<n>& high, const Floats<n>& cos,
                                     const Floats<n>& sin, float direction) {
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float s = sin[k] * direction, x_low = low[k];
    low[k] = x_low * cos[k] - high[k] * s;
    high[k] = high[k] * cos[k] + x_low * s;
  }
}

template <int n>
__global__ void __launch_bounds__(threads) rotate_append(RotateAppend args) {
  const auto operand = static_cast<Operand>(blockIdx.y);
  const TensorView& in = operand == query ? args.q : operand == key ? args.k : args.v;
  const TensorView& out = operand == query ? args.q_out : args.k_out;
  const TensorView& cache = operand == value ? args.values : args.keys;
  const std::int64_t token = blockIdx.x;
  const int half = static_cast<int>(in.shape[2] / 2), heads = static_cast<int>(in.shape[1]);
  const std::int64_t row = load_one(args.rows.as<std::int64_t>() + token);
  const bool kept = operand != query && row >= 0 && row < cache.shape[0];
  const std::int32_t position = load_one(args.positions.as<std::int32_t>() + token);
  const bool inside = position >= 0 && position < args.table.shape[0];
  const float* cosine = args.table.as<float>() + (inside ? position : 0) * args.table.strides[0];
  const float direction = inside ? 1.0f : __uint_as_float(0x7fc00000u);
  for (int i = static_cast<int>(threadIdx.x) * n; i < heads * half; i += threads * n) {
    const int head = i / half, c = i % half;
    const bf16* x = in.as<bf16>() + token * in.strides[0] + head * in.strides[1] + c;
    Floats<n> low = load<n>(x), high = load<n>(x + half);
    if (operand != value) {
      turn<n>(low, high, load<n>(cosine + c), load<n>(cosine + half + c), direction);
      put<n>(out.as<bf16>() + token * out.strides[0] + head * out.strides[1] + c, half, low, high);
    }
    if (kept)
      put<n>(cache.as<bf16>() + row * cache.strides[0] + head * cache.strides[1] + c, half, low, high);
  }
}

__device__ __forceinline__ int largest_of(const Floats<4>& x) {
  return max(max(magnitude(x[0]), magnitude(x[1])), max(magnitude(x[2]), magnitude(x[3])));
}

// Four channels of a head and their partners, to a page's row.
__device__ __forceinline__ void put_bytes(std::uint8_t* row, int half, const Floats<4>& low,
                                          const Floats<4>& high, float low_inverse, float high_inverse) {
  const Packed<std::uint32_t, 1> first{{to_bytes(low.at, low_inverse)}},
      second{{to_bytes(high.at, high_inverse)}};
  store_packed<1>(reinterpret_cast<std::uint32_t*>(row), first);
  store_packed<1>(reinterpret_cast<std::uint32_t*>(row + half), second);
}

__global__ void __launch_bounds__(threads) rotate_append_int8(RotateAppend args) {
  const auto operand = static_cast<Operand>(blockIdx.y);
  const TensorView& in = operand == query ? args.q : operand == key ? args.k : args.v;
  const TensorView& out = operand == query ? args.q_out : args.k_out;
  const std::int64_t token = blockIdx.x;
  const Int8Page page{static_cast<int>(in.shape[2])};
  const int half = page.head_dim / 2, heads = static_cast<int>(in.shape[1]), lanes = half / 4;  // of a head
  const std::int64_t row = load_one(args.rows.as<std::int64_t>() + token);
  const bool kept = operand != query && row >= 0 && row < args.keys.shape[0] * Int8Page::tokens;
  const int inner = static_cast<int>(row % Int8Page::tokens);
  const std::int32_t position = load_one(args.positions.as<std::int32_t>() + token);
  const bool inside = position >= 0 && position < args.table.shape[0];
  const float* cosine = args.table.as<float>() + (inside ? position : 0) * args.table.strides[0];
  const float direction = inside ? 1.0f : __uint_as_float(0x7fc00000u);
  for (int first = 0; first < heads * lanes; first += threads) {  // the same turns in every lane
    const int i = first + static_cast<int>(threadIdx.x), head = i / lanes, c = 4 * (i % lanes);
    const bool there = head < heads;
    Floats<4> low{}, high{};
    if (there) {
      const bf16* x = in.as<bf16>() + token * in.strides[0] + head * in.strides[1] + c;
      low = load<4>(x);
      high = load<4>(x + half);
      if (operand != value) {
        turn<4>(low, high, load<4>(cosine + c), load<4>(cosine + half + c), direction);
        put<4>(out.as<bf16>() + token * out.strides[0] + head * out.strides[1] + c, half, low, high);
      }
    }
    if (!kept) continue;  // of the whole block
    // Of 8 lanes' channels, and of their partners', or of all of a head where it has no more than 32, and of values.
    int of_low = largest_of(low), of_high = largest_of(high);
    const bool of_head = operand == value || page.groups() == 1;
    if (of_head) of_low = of_high = max(of_low, of_high);
    for (int by = 1; by < (operand == value ? lanes : min(lanes, 8)); by *= 2) {
      of_low = max(of_low, __shfl_xor_sync(0xffffffffu, of_low, by));
      of_high = max(of_high, __shfl_xor_sync(0xffffffffu, of_high, by));
    }
    if (!there) continue;
    const Int8Scale low_scale(of_low, operand == key), high_scale(of_high, operand == key);
    std::uint8_t* at = args.keys.as<std::uint8_t>() + (row / Int8Page::tokens * heads + head) * page.bytes();
    put_bytes(at + (operand == value ? page.values() : 0) + inner * page.head_dim + c, half, low, high,
              low_scale.inverse, high_scale.inverse);
    std::uint8_t* scales = at + page.scales() + inner * Int8Page::scale_bytes;
    if (operand == value) {
      if (c == 0)
        store<1>(reinterpret_cast<float*>(scales + Int8Page::value_scale), Floats<1>{{low_scale.scale}});
    } else if (c % Int8Page::scale_channels == 0) {
      bf16* mine = reinterpret_cast<bf16*>(scales) + c / Int8Page::scale_channels;
      store<1>(mine, Floats<1>{{low_scale.scale}});
      if (!of_head) store<1>(mine + page.groups() / 2, Floats<1>{{high_scale.scale}});
    }
  }
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_rotate_append, hrmcore::RotateAppend) {
  using namespace hrmcore::cuda;
  if (args.int8_cache()) {
    if (!rows_are_wide({&args.q, &args.k, &args.v, &args.table, &args.q_out, &args.k_out}))
      return "beside an int8 cache the rows of every operand must be aligned to 16 bytes";
    const LaunchShape shape{dim3(static_cast<unsigned>(args.q.shape[0]), 3), threads};
    return launch(rotate_append_int8, shape, args, stream);
  }
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.table, &args.q_out, &args.k_out,
                                   &args.keys, &args.values}) &&
                    args.q.shape[2] / 2 % 8 == 0;
  const LaunchShape shape{dim3(static_cast<unsigned>(args.q.shape[0]), 3), threads};
  return wide ? launch(rotate_append<8>, shape, args, stream) : launch(rotate_append<1>, shape, args, stream);
}
