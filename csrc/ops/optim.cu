#include "ops/optim.h"

#include <cmath>
#include <cstddef>

#include "core/cuda.cuh"

// Elements in chunks, a block a chunk, one pass, 64-bit indices. The chunks of several tensors are one
// launch: which tensor a block works on stands in a table inside the kernel's parameters, so nothing is
// copied before the launch.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 256;
constexpr int warps = threads / 32;
constexpr std::int64_t chunk = 16 * threads;
constexpr int most_tensors = 48;  // keeps the parameters below CUDA's 4 KB

enum Operand : int { param, grad, exp_avg, second, ema, operands };  // second: v, or h

struct Tensors {
  float* data[most_tensors][operands];  // null where left out
  std::int64_t elements[most_tensors];
  std::uint32_t first_block[most_tensors + 1];
  float m_scale[most_tensors], root_scale[most_tensors];  // Adam's bias corrections
  int count;
};

// What the numbers of an optimizer become, folded in float64.
struct Numbers {
  float lr, decay, ema_share, m_share, second_share;
  float h_scale;  // rho batch_tokens
  float eps;
  const float* grad_scale;  // null: 1
  unsigned long long* clipped;
  unsigned int counters;  // of `clipped`: blocks add to them in turn
};

struct Step {
  Tensors tensors;
  Numbers numbers;
};

static_assert(sizeof(Step) <= 4096, "kernel parameters");

enum class Rule : int { adamw, adam_atan2, adam_atan2_paper, sophia, curvature };

// The elements of this block: those of one tensor from `begin` to `end`.
struct Chunk {
  float* const* data;
  float m_scale, root_scale, grad_scale;
  std::int64_t begin, end;
};

__device__ __forceinline__ Chunk chunk_of_block(const Step& args) {
  const Tensors& tensors = args.tensors;
  int t = 0;
  while (t + 1 < tensors.count && blockIdx.x >= tensors.first_block[t + 1]) ++t;
  const std::int64_t begin = (blockIdx.x - tensors.first_block[t]) * chunk;
  const std::int64_t end = begin + chunk < tensors.elements[t] ? begin + chunk : tensors.elements[t];
  const float grad_scale = args.numbers.grad_scale == nullptr ? 1.0f : load_one(args.numbers.grad_scale);
  return {tensors.data[t], tensors.m_scale[t], tensors.root_scale[t], grad_scale, begin, end};
}

template <int n>
__device__ __forceinline__ void move(const Numbers& by, float* const* data, std::int64_t i,
                                     Floats<n> direction) {
  Floats<n> p = load<n>(data[param] + i);
#pragma unroll
  for (int k = 0; k < n; ++k) p[k] -= by.decay * p[k] + by.lr * direction[k];
  store<n>(data[param] + i, p);
  if (data[ema] == nullptr) return;
  Floats<n> average = load<n>(data[ema] + i);
#pragma unroll
  for (int k = 0; k < n; ++k) average[k] += by.ema_share * (p[k] - average[k]);
  store<n>(data[ema] + i, average);
}

template <int n>
__device__ __forceinline__ Floats<n> scaled_gradient(const Chunk& mine, std::int64_t i) {
  Floats<n> g = load<n>(mine.data[grad] + i);
#pragma unroll
  for (int k = 0; k < n; ++k) g[k] *= mine.grad_scale;
  return g;
}

template <Rule rule, int n>
__device__ __forceinline__ void adam(const Numbers& by, const Chunk& mine, std::int64_t i) {
  float* const* data = mine.data;
  const Floats<n> g = scaled_gradient<n>(mine, i);
  Floats<n> m = load<n>(data[exp_avg] + i), v = load<n>(data[second] + i), direction;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    m[k] += by.m_share * (g[k] - m[k]);
    v[k] += by.second_share * (g[k] * g[k] - v[k]);
    [[maybe_unused]] const float mean = m[k] * mine.m_scale;
    const float root = sqrtf(v[k]) * mine.root_scale;
    if constexpr (rule == Rule::adamw) {
      direction[k] = mean / (root + by.eps);
    } else if constexpr (rule == Rule::adam_atan2_paper) {
      direction[k] = atan2f(mean, root);
    } else {
      direction[k] = mine.m_scale * atan2f(m[k], root);
    }
  }
  store<n>(data[exp_avg] + i, m);
  store<n>(data[second] + i, v);
  move<n>(by, data, i, direction);
}

// Returns how many of the elements were clipped.
template <int n>
__device__ __forceinline__ int sophia(const Numbers& by, const Chunk& mine, std::int64_t i) {
  float* const* data = mine.data;
  const Floats<n> g = scaled_gradient<n>(mine, i), h = load<n>(data[second] + i);
  Floats<n> m = load<n>(data[exp_avg] + i), direction;
  int clipped = 0;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    m[k] += by.m_share * (g[k] - m[k]);
    const float scaled = by.h_scale * h[k];
    const float ratio = m[k] / (scaled < by.eps ? by.eps : scaled);  // in this order a NaN is passed on
    clipped += ratio >= 1.0f || ratio <= -1.0f;
    direction[k] = ratio > 1.0f ? 1.0f : ratio < -1.0f ? -1.0f : ratio;
  }
  store<n>(data[exp_avg] + i, m);
  move<n>(by, data, i, direction);
  return clipped;
}

// h += (1 - beta2) (u w - h), with u and w in the places of grad and exp_avg.
template <int n>
__device__ __forceinline__ void curve(const Numbers& by, float* const* data, std::int64_t i) {
  const Floats<n> u = load<n>(data[grad] + i), w = load<n>(data[exp_avg] + i);
  Floats<n> h = load<n>(data[second] + i);
#pragma unroll
  for (int k = 0; k < n; ++k) h[k] += by.second_share * (u[k] * w[k] - h[k]);
  store<n>(data[second] + i, h);
}

template <Rule rule, int n>
__device__ __forceinline__ int update(const Numbers& by, const Chunk& mine, std::int64_t i) {
  if constexpr (rule == Rule::sophia) return sophia<n>(by, mine, i);
  if constexpr (rule == Rule::curvature) {
    curve<n>(by, mine.data, i);
  } else if constexpr (rule != Rule::sophia) {
    adam<rule, n>(by, mine, i);
  }
  return 0;
}

// One addition a block: a warp each, to one number, would be a queue of their own beside the step's bytes.
__device__ __forceinline__ void add_to_count(const Numbers& by, int clipped) {
  const SharedArray<int> sums = shared_array<int>(0);
  clipped = warp_sum(clipped);
  if (threadIdx.x % 32 == 0) sums[static_cast<int>(threadIdx.x / 32)] = clipped;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < warps; ++warp) clipped += sums[warp];
  if (clipped > 0) {
    atomicAdd(by.clipped + blockIdx.x % by.counters, static_cast<unsigned long long>(clipped));
  }
}

// n: elements of one access, every tensor being aligned to it.
template <Rule rule, int n>
__global__ void __launch_bounds__(threads) step(Step args) {
  const Chunk mine = chunk_of_block(args);
  int clipped = 0;
  for (std::int64_t i = mine.begin + threadIdx.x * n; i < mine.end; i += threads * n) {
    if (i + n <= mine.end) {
      clipped += update<rule, n>(args.numbers, mine, i);
    } else {
      for (std::int64_t k = i; k < mine.end; ++k) clipped += update<rule, 1>(args.numbers, mine, k);
    }
  }
  if constexpr (rule == Rule::sophia) {
    add_to_count(args.numbers, clipped);
  }
}

std::int64_t elements_of(const TensorView& tensor) {
  std::int64_t count = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  return count;
}

float* floats(const TensorView& tensor) { return tensor.given() ? tensor.as<float>() : nullptr; }

void add(Tensors& tensors, const StepTensors& next) {
  const int t = tensors.count++;
  float* const data[operands] = {floats(next.param), floats(next.grad), floats(next.exp_avg),
                                 floats(next.second), floats(next.ema)};
  for (int o = 0; o < operands; ++o) tensors.data[t][o] = data[o];
  tensors.elements[t] = elements_of(next.second);
  const std::int64_t blocks = (tensors.elements[t] + chunk - 1) / chunk;
  tensors.first_block[t + 1] = tensors.first_block[t] + static_cast<std::uint32_t>(blocks);
}

template <Rule rule>
const char* launch_step(const Step& args, void* stream) {
  bool wide = true;
  for (int t = 0; t < args.tensors.count; ++t) {
    for (const float* data : args.tensors.data[t]) {
      wide = wide && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    }
  }
  const LaunchShape shape{dim3(args.tensors.first_block[args.tensors.count]), threads,
                          rule == Rule::sophia ? warps * sizeof(int) : 0};
  return wide ? launch(step<rule, 4>, shape, args, stream) : launch(step<rule, 1>, shape, args, stream);
}

// As many launches as the tables take. fill(i, tensors) adds the i-th parameter.
template <Rule rule, class Fill>
const char* run(std::int64_t count, const Numbers& by, void* stream, const Fill& fill) {
  for (std::int64_t first = 0; first < count; first += most_tensors) {
    Step args{{}, by};
    for (std::int64_t i = first; i < count && i < first + most_tensors; ++i) fill(i, args.tensors);
    if (const char* error = launch_step<rule>(args, stream)) return error;
  }
  return nullptr;
}

template <class Args>
Numbers common(const Args& args) {
  Numbers by{};
  by.lr = static_cast<float>(args.lr);
  by.decay = static_cast<float>(args.lr * args.weight_decay);
  by.ema_share = static_cast<float>(1 - args.ema_decay);
  by.m_share = static_cast<float>(1 - args.beta1);
  by.eps = static_cast<float>(args.eps);
  by.grad_scale = args.grad_scale.given() ? args.grad_scale.template as<float>() : nullptr;
  return by;
}

template <Rule rule>
const char* run_adam(const AdamStep& args, void* stream) {
  Numbers by = common(args);
  by.second_share = static_cast<float>(1 - args.beta2);
  return run<rule>(args.count, by, stream, [&args](std::int64_t i, Tensors& tensors) {
    const double steps = static_cast<double>(args.tensors[i].step);
    tensors.m_scale[tensors.count] = static_cast<float>(1 / (1 - std::pow(args.beta1, steps)));
    tensors.root_scale[tensors.count] = static_cast<float>(1 / std::sqrt(1 - std::pow(args.beta2, steps)));
    add(tensors, args.tensors[i]);
  });
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(sophia_step, hrmcore::SophiaStep) {
  using namespace hrmcore::cuda;
  Numbers by = common(args);
  by.h_scale = static_cast<float>(args.rho * args.batch_tokens);
  by.clipped = args.clipped.as<unsigned long long>();
  by.counters = static_cast<unsigned int>(args.clipped.shape[0]);
  return run<Rule::sophia>(args.count, by, stream,
                           [&args](std::int64_t i, Tensors& tensors) { add(tensors, args.tensors[i]); });
}

HRMCORE_DEVICE_KERNEL(sophia_curvature, hrmcore::SophiaCurvature) {
  using namespace hrmcore::cuda;
  Numbers by{};
  by.second_share = static_cast<float>(1 - args.beta2);
  return run<Rule::curvature>(args.count, by, stream, [&args](std::int64_t i, Tensors& tensors) {
    const hrmcore::CurvatureTensors& t = args.tensors[i];
    add(tensors, {{}, t.probe, t.hvp, t.hessian, {}});
  });
}

HRMCORE_DEVICE_KERNEL(adamw_step, hrmcore::AdamStep) {
  return hrmcore::cuda::run_adam<hrmcore::cuda::Rule::adamw>(args, stream);
}

HRMCORE_DEVICE_KERNEL(adam_atan2_step, hrmcore::AdamStep) {
  return hrmcore::cuda::run_adam<hrmcore::cuda::Rule::adam_atan2>(args, stream);
}

HRMCORE_DEVICE_KERNEL(adam_atan2_paper_step, hrmcore::AdamStep) {
  return hrmcore::cuda::run_adam<hrmcore::cuda::Rule::adam_atan2_paper>(args, stream);
}
