#include "ops/optim.h"

#include <stdexcept>
#include <string>

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_like(const char* op, const char* argument, const TensorView& tensor, const TensorView& like,
                const char* like_name) {
  Check(op, argument, tensor).cpu_or_cuda().dtype({DType::f32}).same_shape(like, like_name).contiguous();
}

void check_tensors(const char* op, const StepTensors& tensors, const char* second) {
  Check(op, "param", tensors.param).cpu_or_cuda().dtype({DType::f32}).contiguous();
  check_like(op, "grad", tensors.grad, tensors.param, "param");
  check_like(op, "exp_avg", tensors.exp_avg, tensors.param, "param");
  check_like(op, second, tensors.second, tensors.param, "param");
  if (tensors.ema.given()) check_like(op, "ema", tensors.ema, tensors.param, "param");
}

void check_scale(const char* op, const TensorView& scale) {
  if (!scale.given()) return;
  Check(op, "grad_scale", scale).cpu_or_cuda().dtype({DType::f32}).rank(1).size(0, 1, "one number");
}

// Runs f on every parameter's tensors; what it rejects is said with that parameter's number.
template <class Args, class F>
void check_each(const Args& args, const F& f) {
  for (std::int64_t i = 0; i < args.count; ++i) {
    try {
      f(args.tensors[i]);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument("parameter " + std::to_string(args.tensors[i].number) + ": " +
                                  error.what());
    }
  }
}

}  // namespace

void check(const SophiaStep& args) {
  const char* op = "sophia_step";
  check_each(args, [op](const StepTensors& tensors) { check_tensors(op, tensors, "hessian"); });
  Check(op, "clipped", args.clipped).cpu_or_cuda().dtype({DType::i64}).rank(1).contiguous();
  if (args.clipped.shape[0] < 1) reject(op, "clipped", "of at least one count", "none");
  check_scale(op, args.grad_scale);
}

void check(const SophiaCurvature& args) {
  const char* op = "sophia_curvature";
  check_each(args, [op](const CurvatureTensors& tensors) {
    Check(op, "hessian", tensors.hessian).cpu_or_cuda().dtype({DType::f32}).contiguous();
    check_like(op, "probe", tensors.probe, tensors.hessian, "hessian");
    check_like(op, "hvp", tensors.hvp, tensors.hessian, "hessian");
  });
}

void check(const AdamStep& args) {
  const char* op = "adam_step";
  check_each(args, [op](const StepTensors& tensors) {
    check_tensors(op, tensors, "exp_avg_sq");
    if (tensors.step < 1) reject(op, "step", "at least 1", std::to_string(tensors.step));
  });
  check_scale(op, args.grad_scale);
}
#endif

namespace HRMCORE_ISA {
namespace {

HRMCORE_INLINE std::int64_t elements_of(const TensorView& tensor) {
  std::int64_t count = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  return count;
}

HRMCORE_INLINE const TensorView& main_tensor(const StepTensors& tensors) { return tensors.param; }
HRMCORE_INLINE const TensorView& main_tensor(const CurvatureTensors& tensors) { return tensors.hessian; }

// Runs f(tensors, first element, elements) over pieces of all tensors, which stand in one line, so that many
// small ones make one block of work and a large one many. Each begins at a multiple of 64 elements: where a
// vector begins within its tensor, and so the result, depends on nothing else.
template <class Tensors, class F>
HRMCORE_INLINE void for_pieces(const Tensors* tensors, std::int64_t count, const F& f) {
  constexpr std::int64_t most = 256;  // tensors of one line
  for (std::int64_t base = 0; base < count; base += most) {
    const std::int64_t in_line = count - base < most ? count - base : most;
    std::int64_t start[most + 1] = {};
    for (std::int64_t t = 0; t < in_line; ++t) {
      start[t + 1] = start[t] + (elements_of(main_tensor(tensors[base + t])) + 63) / 64 * 64;
    }
    parallel_for(start[in_line], rows_of_block(1), [&](std::int64_t begin, std::int64_t end) {
      std::int64_t t = 0;
      while (start[t + 1] <= begin) ++t;
      for (; begin < end; begin = start[++t]) {
        const Tensors& current = tensors[base + t];
        const std::int64_t first = begin - start[t];
        const std::int64_t stop = end < start[t + 1] ? end : start[t + 1];
        const std::int64_t left = elements_of(main_tensor(current)) - first;
        if (left > 0) f(current, first, stop - begin < left ? stop - begin : left);
      }
    });
  }
}

HRMCORE_INLINE float scale_of(const TensorView& grad_scale) {
  return grad_scale.given() ? *grad_scale.as<float>() : 1.0f;
}

HRMCORE_INLINE float* from(const TensorView& tensor, std::int64_t element) {
  return tensor.given() ? tensor.as<float>() + element : nullptr;
}

// Asks for what a stream will read some 2 KB on. A step reads three to five streams, and the processor's own
// prefetching stops at the end of each one's page.
template <class... Stream>
HRMCORE_INLINE void ahead(std::int64_t c, Stream... streams) {
  (__builtin_prefetch(streams + c + 512), ...);
}

HRMCORE_INLINE vfloat absolute(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }

HRMCORE_INLINE vfloat square_root(vfloat x) {
  for (int i = 0; i < lanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// The angle of (x, y) for x >= 0, in [-pi/2, pi/2], to about 2 ulp; 0 for (0, 0). With the smaller and the
// larger of x and |y| as the sides, the angle is below pi/4; from tan(pi/8) on it is turned back by pi/4.
HRMCORE_INLINE vfloat atan2_right(vfloat y, vfloat x) {
  const vfloat height = absolute(y);
  const vfloat low = min(height, x), high = max(height, x);
  const auto turned = low > high * 0.414213562f;
  const vfloat numerator = turned ? low - high : low;
  const vfloat denominator = turned ? low + high : high;
  const vfloat t = high == 0.0f ? vfloat{} : numerator / denominator;
  const vfloat z = t * t;
  vfloat p = splat(8.05374449538e-2f);
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  p = p * z * t + t;
  p = turned ? p + 0.785398163f : p;
  p = height > x ? 1.57079633f - p : p;
  const vfloat angle = (vfloat)((vint)p | ((vint)y & (vint)splat(-0.0f)));
  return y == y ? angle : y;
}

// How every step ends: the weights decay, move, and enter their average.
struct Mover {
  float decay;      // lr weight_decay
  float ema_share;  // 1 - ema_decay
};

template <class Args>
HRMCORE_INLINE Mover mover(const Args& args) {
  return {static_cast<float>(args.lr * args.weight_decay), static_cast<float>(1 - args.ema_decay)};
}

template <class Get, class Put>
HRMCORE_INLINE void move(const Mover& weights, float* param, float* ema, std::int64_t c, vfloat by, Get get,
                         Put put) {
  const vfloat p = get(param + c);
  const vfloat moved = p - (weights.decay * p + by);
  if (ema != nullptr) {
    ahead(c, ema);
    const vfloat average = get(ema + c);
    put(ema + c, average + weights.ema_share * (moved - average));
  }
  put(param + c, moved);
}

HRMCORE_INLINE std::int64_t sum_counts(vint counts) {
  std::int64_t total = 0;
  for (int i = 0; i < lanes; ++i) total += counts[i];
  return total;
}

// One step of an Adam: direction(m, m_scale, sqrt(v')) is what p moves by, for a learning rate of 1; m' is
// m times m_scale.
template <class Direction>
HRMCORE_INLINE void adam_step(const AdamStep& args, const Direction& direction) {
  const float m_share = static_cast<float>(1 - args.beta1), v_share = static_cast<float>(1 - args.beta2);
  const float lr = static_cast<float>(args.lr), grad_scale = scale_of(args.grad_scale);
  const Mover weights = mover(args);
  for_pieces(args.tensors, args.count, [&](const StepTensors& t, std::int64_t first, std::int64_t elements) {
    const double steps = static_cast<double>(t.step);
    const float m_scale = static_cast<float>(1 / (1 - __builtin_pow(args.beta1, steps)));
    const float root_scale = static_cast<float>(1 / __builtin_sqrt(1 - __builtin_pow(args.beta2, steps)));
    float *param = from(t.param, first), *ema = from(t.ema, first);
    float *exp_avg = from(t.exp_avg, first), *exp_avg_sq = from(t.second, first);
    const float* grad = from(t.grad, first);
    for_columns(elements, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      ahead(c, grad, exp_avg, exp_avg_sq, param);
      const vfloat g = get(grad + c) * grad_scale, m_old = get(exp_avg + c), v_old = get(exp_avg_sq + c);
      const vfloat m = m_old + m_share * (g - m_old), v = v_old + v_share * (g * g - v_old);
      const vfloat by = lr * direction(m, m_scale, square_root(v) * root_scale);
      move(weights, param, ema, c, by, get, put);
      put(exp_avg + c, m);
      put(exp_avg_sq + c, v);
    });
  });
}

}  // namespace

void sophia_step(const SophiaStep& args) noexcept {
  const float m_share = static_cast<float>(1 - args.beta1);
  const float h_scale = static_cast<float>(args.rho * args.batch_tokens);
  const float lr = static_cast<float>(args.lr), grad_scale = scale_of(args.grad_scale);
  const vfloat one = splat(1.0f), eps = splat(static_cast<float>(args.eps));
  const Mover weights = mover(args);
  for_pieces(args.tensors, args.count, [&](const StepTensors& t, std::int64_t first, std::int64_t elements) {
    float *param = from(t.param, first), *ema = from(t.ema, first), *exp_avg = from(t.exp_avg, first);
    const float *grad = from(t.grad, first), *hessian = from(t.second, first);
    vint counts = {};
    for_columns(elements, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      ahead(c, grad, hessian, exp_avg, param);
      const vfloat m_old = get(exp_avg + c);
      const vfloat m = m_old + m_share * (get(grad + c) * grad_scale - m_old);
      const vfloat ratio = m / max(eps, h_scale * get(hessian + c));
      counts -= (vint)(absolute(ratio) >= one);
      const vfloat by = lr * min(one, max(-one, ratio));  // in this order a NaN is passed on
      move(weights, param, ema, c, by, get, put);
      put(exp_avg + c, m);
    });
    __atomic_fetch_add(args.clipped.as<std::int64_t>(), sum_counts(counts), __ATOMIC_RELAXED);
  });
}

void sophia_curvature(const SophiaCurvature& args) noexcept {
  const float share = static_cast<float>(1 - args.beta2);
  for_pieces(args.tensors, args.count,
             [&](const CurvatureTensors& t, std::int64_t first, std::int64_t elements) {
               float* hessian = from(t.hessian, first);
               const float *probe = from(t.probe, first), *hvp = from(t.hvp, first);
               for_columns(elements, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
                 ahead(c, probe, hvp, hessian);
                 const vfloat h = get(hessian + c);
                 put(hessian + c, h + share * (get(probe + c) * get(hvp + c) - h));
               });
             });
}

void adamw_step(const AdamStep& args) noexcept {
  const float eps = static_cast<float>(args.eps);
  adam_step(args, [eps](vfloat m, float m_scale, vfloat root)
                      __attribute__((always_inline)) { return m * m_scale / (root + eps); });
}

void adam_atan2_step(const AdamStep& args) noexcept {
  adam_step(args, [](vfloat m, float m_scale, vfloat root)
                      __attribute__((always_inline)) { return m_scale * atan2_right(m, root); });
}

void adam_atan2_paper_step(const AdamStep& args) noexcept {
  adam_step(args, [](vfloat m, float m_scale, vfloat root)
                      __attribute__((always_inline)) { return atan2_right(m * m_scale, root); });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
