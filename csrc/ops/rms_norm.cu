#include "ops/rms_norm.h"

#include "core/cuda.cuh"

// A warp a row: each lane keeps its own partial sums, one butterfly adds them, and the row is read a second
// time, from the cache, to be written. So the first pass is what global memory sees: 2 T D elements, 4 T D
// with the residual. Between two visits there are two norms, and so a third pass.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 256;
constexpr int rows_per_block = threads / 32;

template <class T>
__device__ __forceinline__ T* row_of(const TensorView& tensor, std::int64_t row) {
  return tensor.given() ? tensor.as<T>() + row * tensor.strides[0] : nullptr;
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, std::int64_t width, double eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + static_cast<float>(eps));
}

__device__ __forceinline__ std::int64_t row_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / 32;
}

// n: elements of one access; every row is then a whole number of them, aligned.
template <class T, int n>
__global__ void __launch_bounds__(threads) forward(RmsNormForward args) {
  const std::int64_t row = row_of_warp(), width = args.x.shape[1];
  if (row >= args.x.shape[0]) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T* x = row_of<T>(args.x, row);
  const T* residual = row_of<T>(args.residual, row);
  T* y = row_of<T>(args.y, row);
  T* u = row_of<T>(args.sum, row);
  float squares = 0;
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    Floats<n> v = load<n>(x + c);
    if (residual != nullptr) {
      const Floats<n> r = load<n>(residual + c);
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] = rounded<T>(v[i] + r[i]);  // what later readers of the sum see
      store<n>(u + c, v);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) squares += v[i] * v[i];
  }
  const float scale = inverse_rms(warp_sum(squares), width, args.eps);
  const T* normalised = residual != nullptr ? u : x;
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    Floats<n> v = load<n>(normalised + c);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= scale;
    store<n>(y + c, v);
  }
}

template <class T, int n>
__global__ void __launch_bounds__(threads) backward(RmsNormBackward args) {
  const std::int64_t row = row_of_warp(), width = args.u.shape[1];
  if (row >= args.u.shape[0]) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T* u = row_of<T>(args.u, row);
  const T* grad_y = row_of<T>(args.grad_y, row);
  const T* grad_sum = row_of<T>(args.grad_sum, row);
  T* grad_u = row_of<T>(args.grad_u, row);
  float squares = 0, products = 0;
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    const Floats<n> v = load<n>(u + c), g = load<n>(grad_y + c);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      squares += v[i] * v[i];
      products += v[i] * g[i];
    }
  }
  const float scale = inverse_rms(warp_sum(squares), width, args.eps);
  const float projection = warp_sum(products) / static_cast<float>(width) * scale * scale * scale;
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    const Floats<n> v = load<n>(u + c);
    Floats<n> g = load<n>(grad_y + c);
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = g[i] * scale - v[i] * projection;
    if (grad_sum != nullptr) {
      const Floats<n> more = load<n>(grad_sum + c);
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] += more[i];
    }
    store<n>(grad_u + c, g);
  }
}

template <class T, int n>
__global__ void __launch_bounds__(threads) inject_forward(RmsNormInjectForward args) {
  const std::int64_t row = row_of_warp(), width = args.x.shape[1];
  if (row >= args.x.shape[0]) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T* x = row_of<T>(args.x, row);
  const T* residual = row_of<T>(args.residual, row);
  const T* injection = row_of<T>(args.injection, row);
  T* state = row_of<T>(args.state, row);
  T* y = row_of<T>(args.y, row);
  T* total = row_of<T>(args.sum, row);
  float squares = 0, total_squares = 0;
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    const Floats<n> v = load<n>(x + c), r = load<n>(residual + c);
#pragma unroll
    for (int i = 0; i < n; ++i) squares += (v[i] + r[i]) * (v[i] + r[i]);
  }
  const float scale = inverse_rms(warp_sum(squares), width, args.eps);
  if (lane == 0) store<1>(row_of<float>(args.scale, row), Floats<1>{{scale}});
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    Floats<n> v = load<n>(x + c);
    const Floats<n> r = load<n>(residual + c), more = load<n>(injection + c);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = rounded<T>((v[i] + r[i]) * scale);  // what later readers see
    store<n>(state + c, v);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = rounded<T>(v[i] + more[i]);
      total_squares += v[i] * v[i];
    }
    store<n>(total + c, v);
  }
  const float total_scale = inverse_rms(warp_sum(total_squares), width, args.eps);
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    Floats<n> v = load<n>(total + c);
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] *= total_scale;
    store<n>(y + c, v);
  }
}

template <class T, int n>
__global__ void __launch_bounds__(threads) inject_backward(RmsNormInjectBackward args) {
  const std::int64_t row = row_of_warp(), width = args.state.shape[1];
  if (row >= args.state.shape[0]) return;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const T* state = row_of<T>(args.state, row);
  const T* total = row_of<T>(args.sum, row);
  const T* grad_state = row_of<T>(args.grad_state, row);
  const T* grad_y = row_of<T>(args.grad_y, row);
  const T* grad_sum = row_of<T>(args.grad_sum, row);
  T* grad_u = row_of<T>(args.grad_u, row);
  T* grad_injection = row_of<T>(args.grad_injection, row);
  float squares = 0, products = 0, state_products = 0;
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    const Floats<n> v = load<n>(total + c), g = load<n>(grad_y + c);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      squares += v[i] * v[i];
      products += v[i] * g[i];
    }
  }
  const float total_scale = inverse_rms(warp_sum(squares), width, args.eps);
  const float projection =
      warp_sum(products) / static_cast<float>(width) * total_scale * total_scale * total_scale;
  const auto to_injection = [&](std::int64_t c) {
    const Floats<n> v = load<n>(total + c);
    Floats<n> g = load<n>(grad_y + c);
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = g[i] * total_scale - v[i] * projection;
    if (grad_sum != nullptr) {
      const Floats<n> more = load<n>(grad_sum + c);
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] += more[i];
    }
    return g;
  };
  const auto to_state = [&](std::int64_t c, Floats<n> g) {
    if (grad_state != nullptr) {
      const Floats<n> more = load<n>(grad_state + c);
#pragma unroll
      for (int i = 0; i < n; ++i) g[i] += more[i];
    }
    return g;
  };
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    const Floats<n> injected = to_injection(c), g = to_state(c, injected), s = load<n>(state + c);
    if (grad_injection != nullptr) store<n>(grad_injection + c, injected);
#pragma unroll
    for (int i = 0; i < n; ++i) state_products += g[i] * s[i];
  }
  const float scale = load_one(row_of<float>(args.scale, row));
  const float mean = warp_sum(state_products) / static_cast<float>(width);
  for (std::int64_t c = lane * n; c < width; c += 32 * n) {
    Floats<n> g = to_state(c, to_injection(c));
    const Floats<n> s = load<n>(state + c);
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = (g[i] - s[i] * mean) * scale;
    store<n>(grad_u + c, g);
  }
}

LaunchShape shape_for(std::int64_t rows) {
  return {dim3(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block)), threads};
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(rms_norm_forward, hrmcore::RmsNormForward) {
  using namespace hrmcore::cuda;
  const bool wide = rows_are_wide({&args.x, &args.residual, &args.y, &args.sum});
  return with_element(args.x.dtype, wide, [&](auto element, auto n) {
    return launch(forward<decltype(element), n()>, shape_for(args.x.shape[0]), args, stream);
  });
}

HRMCORE_DEVICE_KERNEL(rms_norm_backward, hrmcore::RmsNormBackward) {
  using namespace hrmcore::cuda;
  const bool wide = rows_are_wide({&args.u, &args.grad_y, &args.grad_sum, &args.grad_u});
  return with_element(args.u.dtype, wide, [&](auto element, auto n) {
    return launch(backward<decltype(element), n()>, shape_for(args.u.shape[0]), args, stream);
  });
}

HRMCORE_DEVICE_KERNEL(rms_norm_inject_forward, hrmcore::RmsNormInjectForward) {
  using namespace hrmcore::cuda;
  const bool wide =
      rows_are_wide({&args.x, &args.residual, &args.injection, &args.state, &args.y, &args.sum});
  return with_element(args.x.dtype, wide, [&](auto element, auto n) {
    return launch(inject_forward<decltype(element), n()>, shape_for(args.x.shape[0]), args, stream);
  });
}

HRMCORE_DEVICE_KERNEL(rms_norm_inject_backward, hrmcore::RmsNormInjectBackward) {
  using namespace hrmcore::cuda;
  const bool wide = rows_are_wide({&args.state, &args.sum, &args.grad_state, &args.grad_y, &args.grad_sum,
                                   &args.grad_u, &args.grad_injection});
  return with_element(args.state.dtype, wide, [&](auto element, auto n) {
    return launch(inject_backward<decltype(element), n()>, shape_for(args.state.shape[0]), args, stream);
  });
}
