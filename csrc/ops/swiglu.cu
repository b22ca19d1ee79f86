#include "ops/swiglu.h"

#include "core/cuda.cuh"

// A thread a 16-byte piece of a row; every element is read once and written once, as the contract counts it.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The thread's first column; blocks along x are rows.
template <int n>
__device__ __forceinline__ std::int64_t first_column() {
  return (static_cast<std::int64_t>(blockIdx.y) * threads + threadIdx.x) * n;
}

template <class T, int n>
__global__ void __launch_bounds__(threads) forward(SwigluForward args) {
  const std::int64_t width = args.y.shape[1], row = blockIdx.x, c = first_column<n>();
  if (c >= width) return;
  const T* ab = args.ab.as<T>() + row * args.ab.strides[0] + c;
  const Floats<n> a = load<n>(ab), b = load<n>(ab + width);
  Floats<n> y;
#pragma unroll
  for (int i = 0; i < n; ++i) y[i] = a[i] * sigmoid(a[i]) * b[i];
  store<n>(args.y.as<T>() + row * args.y.strides[0] + c, y);
}

template <class T, int n>
__global__ void __launch_bounds__(threads) backward(SwigluBackward args) {
  const std::int64_t width = args.grad_y.shape[1], row = blockIdx.x, c = first_column<n>();
  if (c >= width) return;
  const T* ab = args.ab.as<T>() + row * args.ab.strides[0] + c;
  const Floats<n> a = load<n>(ab), b = load<n>(ab + width);
  const Floats<n> grad = load<n>(args.grad_y.as<T>() + row * args.grad_y.strides[0] + c);
  Floats<n> grad_a, grad_b, y;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float s = sigmoid(a[i]);
    grad_a[i] = grad[i] * b[i] * s * (1.0f + a[i] * (1.0f - s));
    grad_b[i] = grad[i] * a[i] * s;
    y[i] = a[i] * s * b[i];
  }
  T* grad_ab = args.grad_ab.as<T>() + row * args.grad_ab.strides[0] + c;
  store<n>(grad_ab, grad_a);
  store<n>(grad_ab + width, grad_b);
  if (args.y.given()) store<n>(args.y.as<T>() + row * args.y.strides[0] + c, y);
}

LaunchShape shape_for(std::int64_t rows, std::int64_t width, int n) {
  const std::int64_t columns = static_cast<std::int64_t>(threads) * n;
  return {dim3(static_cast<unsigned>(rows), static_cast<unsigned>((width + columns - 1) / columns)), threads};
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(swiglu_forward, hrmcore::SwigluForward) {
  using namespace hrmcore::cuda;
  return with_element(args.ab.dtype, rows_are_wide({&args.ab, &args.y}), [&](auto element, auto n) {
    const LaunchShape shape = shape_for(args.y.shape[0], args.y.shape[1], n());
    return launch(forward<decltype(element), n()>, shape, args, stream);
  });
}

HRMCORE_DEVICE_KERNEL(swiglu_backward, hrmcore::SwigluBackward) {
  using namespace hrmcore::cuda;
  const bool wide = rows_are_wide({&args.ab, &args.grad_y, &args.grad_ab, &args.y});
  return with_element(args.ab.dtype, wide, [&](auto element, auto n) {
    const LaunchShape shape = shape_for(args.grad_y.shape[0], args.grad_y.shape[1], n());
    return launch(backward<decltype(element), n()>, shape, args, stream);
  });
}
