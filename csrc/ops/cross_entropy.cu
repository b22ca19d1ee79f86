#include "ops/cross_entropy.h"

#include "core/cuda.cuh"

// A block a row. Forward reads it twice, for its maximum and for the sum of exponentials, the second time
// from cache; a thread adds up its columns in float32, the threads' sums are added in float64. Targets are
// not read on the host: -1 gives no loss and a gradient of zeros, another one outside of the vocabulary NaNs.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// Of every thread's number, in every thread: combined in the same order whatever the schedule. `shared` holds
// one for each warp and is free again after the next barrier.
template <class T, class F>
__device__ __forceinline__ T reduce_block(T x, SharedArray<T> shared, const F& combine) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, by));
  if (threadIdx.x % 32 == 0) shared[static_cast<int>(threadIdx.x / 32)] = x;
  __syncthreads();
  T all = shared[0];
#pragma unroll
  for (int warp = 1; warp < warps; ++warp) all = combine(all, static_cast<T>(shared[warp]));
  return all;
}

// n: elements of one access; every row is then a whole number of them, aligned.
template <class T, int n>
__global__ void __launch_bounds__(threads) forward(CrossEntropyForward args) {
  const std::int64_t row = blockIdx.x, width = args.logits.shape[1];
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * n;
  const T* logits = args.logits.as<T>() + row * args.logits.strides[0];
  const std::int64_t target = load_one(args.targets.as<std::int64_t>() + row);
  if (target == no_target) {
    if (threadIdx.x != 0) return;
    store_packed<1>(args.losses.as<double>() + row, Packed<double, 1>{{0.0}});
    store<1>(args.lse.as<float>() + row, {{0.0f}});
    return;
  }
  float highest = -__builtin_inff();
  for (std::int64_t c = first; c < width; c += threads * n) {
    const Floats<n> x = load<n>(logits + c);
#pragma unroll
    for (int i = 0; i < n; ++i) highest = fmaxf(highest, x[i]);
  }
  const float top =
      reduce_block(highest, shared_array<float>(0), [](float a, float b) { return fmaxf(a, b); });
  float partial = 0;
  for (std::int64_t c = first; c < width; c += threads * n) {
    const Floats<n> x = load<n>(logits + c);
#pragma unroll
    for (int i = 0; i < n; ++i) partial += expf(x[i] - top);
  }
  const double total =
      reduce_block(static_cast<double>(partial), shared_array<double>(warps * sizeof(double)),
                   [](double a, double b) { return a + b; });
  if (threadIdx.x != 0) return;
  const double above = log(total);
  const bool inside = target >= 0 && target < width;
  const float chosen = inside ? load<1>(logits + target)[0] : not_a_number();
  const double loss = above + (static_cast<double>(top) - static_cast<double>(chosen));
  store_packed<1>(args.losses.as<double>() + row, Packed<double, 1>{{loss}});
  store<1>(args.lse.as<float>() + row, {{static_cast<float>(above + static_cast<double>(top))}});
}

template <class T, int n>
__global__ void __launch_bounds__(threads) backward(CrossEntropyBackward args) {
  const std::int64_t row = blockIdx.x, width = args.logits.shape[1];
  T* logits = args.logits.as<T>() + row * args.logits.strides[0];
  const std::int64_t target = load_one(args.targets.as<std::int64_t>() + row);
  const bool inside = target >= 0 && target < width;
  const float lse = load<1>(args.lse.as<float>() + row)[0];
  const float scale = inside ? load_one(args.scale.as<float>()) : not_a_number();
  for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x) * n; c < width; c += threads * n) {
    Floats<n> x = load<n>(logits + c);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float slope = (expf(x[i] - lse) - (c + i == target ? 1.0f : 0.0f)) * scale;
      x[i] = target == no_target ? 0.0f : slope;
    }
    store<n>(logits + c, x);
  }
}

LaunchShape shape_for(std::int64_t rows) {
  return {dim3(static_cast<unsigned>(rows)), threads, 2 * warps * sizeof(double)};
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cross_entropy_forward, hrmcore::CrossEntropyForward) {
  using namespace hrmcore::cuda;
  return with_element(args.logits.dtype, rows_are_wide({&args.logits}), [&](auto element, auto n) {
    return launch(forward<decltype(element), n()>, shape_for(args.logits.shape[0]), args, stream);
  });
}

HRMCORE_DEVICE_KERNEL(cross_entropy_backward, hrmcore::CrossEntropyBackward) {
  using namespace hrmcore::cuda;
  return with_element(args.logits.dtype, rows_are_wide({&args.logits}), [&](auto element, auto n) {
    return launch(backward<decltype(element), n()>, shape_for(args.logits.shape[0]), args, stream);
  });
}
