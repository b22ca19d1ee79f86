#include "ops/rope.h"

#include "core/cuda.cuh"

// A block a token and one of q and k; a thread owns n channels of the lower half and their partners in the
// upper, so an output may be its own input. Positions are not read on the host: one outside of the table
// gives a row of NaNs.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 128;

template <class T, int n>
__global__ void __launch_bounds__(threads) rotate(Rope args) {
  const TensorView& in = blockIdx.y == 0 ? args.q : args.k;
  const TensorView& out = blockIdx.y == 0 ? args.q_out : args.k_out;
  const std::int64_t token = blockIdx.x;
  const int half = static_cast<int>(in.shape[2] / 2), heads = static_cast<int>(in.shape[1]);
  const std::int32_t position =
      load_one(args.positions.as<std::int32_t>() + token * args.positions.strides[0]);
  const bool inside = position >= 0 && position < args.table.shape[0];
  const float* cosine = args.table.as<float>() + (inside ? position : 0) * args.table.strides[0];
  const float direction = inside ? (args.inverse ? -1.0f : 1.0f) : __uint_as_float(0x7fc00000u);
  for (int i = static_cast<int>(threadIdx.x) * n; i < heads * half; i += threads * n) {
    const int head = i / half, c = i % half;
    const T* x = in.as<T>() + token * in.strides[0] + head * in.strides[1] + c;
    T* y = out.as<T>() + token * out.strides[0] + head * out.strides[1] + c;
    const Floats<n> low = load<n>(x), high = load<n>(x + half);
    const Floats<n> cos = load<n>(cosine + c), sin = load<n>(cosine + half + c);
    Floats<n> low_out, high_out;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float s = sin[k] * direction;
      low_out[k] = low[k] * cos[k] - high[k] * s;
      high_out[k] = high[k] * cos[k] + low[k] * s;
    }
    store<n>(y, low_out);
    store<n>(y + half, high_out);
  }
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(rope, hrmcore::Rope) {
  using namespace hrmcore::cuda;
  const std::int64_t half = args.q.shape[2] / 2;
  const bool wide = rows_are_wide({&args.q, &args.k, &args.q_out, &args.k_out, &args.table}) && half % 8 == 0;
  const LaunchShape shape{dim3(static_cast<unsigned>(args.q.shape[0]), 2), threads};
  return with_element(args.q.dtype, wide, [&](auto element, auto n) {
    return launch(rotate<decltype(element), n()>, shape, args, stream);
  });
}
