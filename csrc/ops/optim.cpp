#include "ops/optim.h"

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_like(const char* op, const char* argument, const TensorView& tensor, const TensorView& like,
                const char* like_name) {
  Check(op, argument, tensor).cpu_or_cuda().dtype({DType::f32}).same_shape(like, like_name).contiguous();
}

void check_common(const char* op, const TensorView& param, const TensorView& grad, const TensorView& exp_avg,
                  const TensorView& ema) {
  Check(op, "param", param).cpu_or_cuda().dtype({DType::f32}).contiguous();
  check_like(op, "grad", grad, param, "param");
  check_like(op, "exp_avg", exp_avg, param, "param");
  if (ema.given()) check_like(op, "ema", ema, param, "param");
}

}  // namespace

void check(const SophiaStep& args) {
  const char* op = "sophia_step";
  check_common(op, args.param, args.grad, args.exp_avg, args.ema);
  check_like(op, "hessian", args.hessian, args.param, "param");
  Check(op, "clipped", args.clipped).cpu_or_cuda().dtype({DType::i64}).rank(1).size(0, 1, "one count");
}

void check(const SophiaCurvature& args) {
  const char* op = "sophia_curvature";
  Check(op, "hessian", args.hessian).cpu_or_cuda().dtype({DType::f32}).contiguous();
  check_like(op, "u", args.u, args.hessian, "hessian");
  check_like(op, "w", args.w, args.hessian, "hessian");
}

void check(const AdamStep& args) {
  const char* op = "adam_step";
  check_common(op, args.param, args.grad, args.exp_avg, args.ema);
  check_like(op, "exp_avg_sq", args.exp_avg_sq, args.param, "param");
  if (args.step < 1) reject(op, "step", "at least 1", std::to_string(args.step));
}
#endif

namespace HRMCORE_ISA {
namespace {

// Runs f(first element, elements) over the blocks of a tensor.
template <class F>
HRMCORE_INLINE void for_blocks(const TensorView& tensor, const F& f) {
  std::int64_t count = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) count *= tensor.shape[axis];
  parallel_for(count, rows_of_block(1), [&](std::int64_t begin, std::int64_t end) { f(begin, end - begin); });
}

HRMCORE_INLINE float* from(const TensorView& tensor, std::int64_t element) {
  return tensor.given() ? tensor.as<float>() + element : nullptr;
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
  float* param;
  float* ema;       // or null
  float decay;      // lr weight_decay
  float ema_share;  // 1 - ema_decay
};

template <class Args>
HRMCORE_INLINE Mover mover(const Args& args, std::int64_t first) {
  return {from(args.param, first), from(args.ema, first), static_cast<float>(args.lr * args.weight_decay),
          static_cast<float>(1 - args.ema_decay)};
}

template <class Get, class Put>
HRMCORE_INLINE void move(const Mover& weights, std::int64_t c, vfloat by, Get get, Put put) {
  const vfloat p = get(weights.param + c);
  const vfloat moved = p - (weights.decay * p + by);
  put(weights.param + c, moved);
  if (weights.ema != nullptr) {
    const vfloat average = get(weights.ema + c);
    put(weights.ema + c, average + weights.ema_share * (moved - average));
  }
}

HRMCORE_INLINE std::int64_t sum_counts(vint counts) {
  std::int64_t total = 0;
  for (int i = 0; i < lanes; ++i) total += counts[i];
  return total;
}

// One step of an Adam: direction(m', v') is what p moves by, for a learning rate of 1.
template <class Direction>
HRMCORE_INLINE void adam_step(const AdamStep& args, const Direction& direction) {
  const double steps = static_cast<double>(args.step);
  const float m_scale = static_cast<float>(1 / (1 - __builtin_pow(args.beta1, steps)));
  const float root_scale = static_cast<float>(1 / __builtin_sqrt(1 - __builtin_pow(args.beta2, steps)));
  const float m_share = static_cast<float>(1 - args.beta1), v_share = static_cast<float>(1 - args.beta2);
  const float lr = static_cast<float>(args.lr);
  for_blocks(args.param, [&](std::int64_t first, std::int64_t elements) {
    const Mover weights = mover(args, first);
    float *exp_avg = from(args.exp_avg, first), *exp_avg_sq = from(args.exp_avg_sq, first);
    const float* grad = from(args.grad, first);
    for_columns(elements, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat g = get(grad + c), m_old = get(exp_avg + c), v_old = get(exp_avg_sq + c);
      const vfloat m = m_old + m_share * (g - m_old), v = v_old + v_share * (g * g - v_old);
      put(exp_avg + c, m);
      put(exp_avg_sq + c, v);
      const vfloat by = lr * direction(m * m_scale, square_root(v) * root_scale);
      move(weights, c, by, get, put);
    });
  });
}

}  // namespace

void sophia_step(const SophiaStep& args) noexcept {
  const float m_share = static_cast<float>(1 - args.beta1);
  const float h_scale = static_cast<float>(args.rho * args.batch_tokens);
  const float lr = static_cast<float>(args.lr);
  const vfloat one = splat(1.0f), eps = splat(static_cast<float>(args.eps));
  for_blocks(args.param, [&](std::int64_t first, std::int64_t elements) {
    const Mover weights = mover(args, first);
    float* exp_avg = from(args.exp_avg, first);
    const float *grad = from(args.grad, first), *hessian = from(args.hessian, first);
    vint counts = {};
    for_columns(elements, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat m_old = get(exp_avg + c);
      const vfloat m = m_old + m_share * (get(grad + c) - m_old);
      put(exp_avg + c, m);
      const vfloat ratio = m / max(eps, h_scale * get(hessian + c));
      counts -= (vint)(absolute(ratio) >= one);
      const vfloat by = lr * min(one, max(-one, ratio));  // in this order a NaN is passed on
      move(weights, c, by, get, put);
    });
    __atomic_fetch_add(args.clipped.as<std::int64_t>(), sum_counts(counts), __ATOMIC_RELAXED);
  });
}

void sophia_curvature(const SophiaCurvature& args) noexcept {
  const float share = static_cast<float>(1 - args.beta2);
  for_blocks(args.hessian, [&](std::int64_t first, std::int64_t elements) {
    float* hessian = from(args.hessian, first);
    const float *u = from(args.u, first), *w = from(args.w, first);
    for_columns(elements, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat h = get(hessian + c);
      put(hessian + c, h + share * (get(u + c) * get(w + c) - h));
    });
  });
}

void adamw_step(const AdamStep& args) noexcept {
  const float eps = static_cast<float>(args.eps);
  adam_step(args, [eps](vfloat m, vfloat root) __attribute__((always_inline)) { return m / (root + eps); });
}

void adam_atan2_step(const AdamStep& args) noexcept {
  adam_step(args, [](vfloat m, vfloat root) __attribute__((always_inline)) { return atan2_right(m, root); });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
