#include "decode/rotate_append.h"

#include "core/cuda.cuh"

// A block a token and one of q, k and v; a thread owns n channels of the lower half of a head and their partners in the
// upper, of values too.

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
      const Floats<n> cos = load<n>(cosine + c), sin = load<n>(cosine + half + c);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float s = sin[k] * direction, x_low = low[k];
        low[k] = x_low * cos[k] - high[k] * s;
        high[k] = high[k] * cos[k] + x_low * s;
      }
      put<n>(out.as<bf16>() + token * out.strides[0] + head * out.strides[1] + c, half, low, high);
    }
    if (kept)
      put<n>(cache.as<bf16>() + row * cache.strides[0] + head * cache.strides[1] + c, half, low, high);
  }
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_rotate_append, hrmcore::RotateAppend) {
  using namespace hrmcore::cuda;
  const bool wide = rows_are_wide({&args.q, &args.k, &args.v, &args.table, &args.q_out, &args.k_out,
                                   &args.keys, &args.values}) &&
                    args.q.shape[2] / 2 % 8 == 0;
  const LaunchShape shape{dim3(static_cast<unsigned>(args.q.shape[0]), 3), threads};
  return wide ? launch(rotate_append<8>, shape, args, stream) : launch(rotate_append<1>, shape, args, stream);
}
