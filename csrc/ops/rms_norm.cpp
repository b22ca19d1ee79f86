#include "ops/rms_norm.h"

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_rows(const char* op, const char* argument, const TensorView& tensor, const TensorView& like) {
  Check(op, argument, tensor)
      .cpu_or_cuda()
      .rank(2)
      .dtype({like.dtype})
      .same_shape(like, "the input")
      .last_contiguous();
}

void check_input(const char* op, const char* argument, const TensorView& tensor, double eps) {
  Check(op, argument, tensor).cpu_or_cuda().rank(2).dtype({DType::f32, DType::bf16}).last_contiguous();
  if (tensor.shape[1] < 1) reject(op, argument, "at least one column wide (D)", "0");
  if (!(eps >= 0) || eps > 1) reject(op, "eps", "between 0 and 1", std::to_string(eps));
}

void check_scale(const char* op, const TensorView& scale, const TensorView& like) {
  Check(op, "scale", scale)
      .cpu_or_cuda()
      .rank(1)
      .dtype({DType::f32})
      .size(0, like.shape[0], "T")
      .last_contiguous();
}

}  // namespace

void check(const RmsNormForward& args) {
  const char* op = "rms_norm_forward";
  check_input(op, "x", args.x, args.eps);
  if (args.residual.given()) check_rows(op, "residual", args.residual, args.x);
  check_rows(op, "y", args.y, args.x);
  if (args.residual.given() || args.sum.given()) check_rows(op, "sum", args.sum, args.x);
  if (args.sum.given() && !args.residual.given())
    reject(op, "sum", "left out without a residual", "a tensor");
}

void check(const RmsNormBackward& args) {
  const char* op = "rms_norm_backward";
  check_input(op, "u", args.u, args.eps);
  check_rows(op, "grad_y", args.grad_y, args.u);
  if (args.grad_sum.given()) check_rows(op, "grad_sum", args.grad_sum, args.u);
  check_rows(op, "grad_u", args.grad_u, args.u);
}

void check(const RmsNormInjectForward& args) {
  const char* op = "rms_norm_inject_forward";
  check_input(op, "x", args.x, args.eps);
  check_rows(op, "residual", args.residual, args.x);
  check_rows(op, "injection", args.injection, args.x);
  check_rows(op, "state", args.state, args.x);
  check_rows(op, "y", args.y, args.x);
  check_rows(op, "sum", args.sum, args.x);
  check_scale(op, args.scale, args.x);
}

void check(const RmsNormInjectBackward& args) {
  const char* op = "rms_norm_inject_backward";
  check_input(op, "state", args.state, args.eps);
  check_rows(op, "sum", args.sum, args.state);
  check_scale(op, args.scale, args.state);
  if (args.grad_state.given()) check_rows(op, "grad_state", args.grad_state, args.state);
  check_rows(op, "grad_y", args.grad_y, args.state);
  if (args.grad_sum.given()) check_rows(op, "grad_sum", args.grad_sum, args.state);
  check_rows(op, "grad_u", args.grad_u, args.state);
  if (args.grad_injection.given()) check_rows(op, "grad_injection", args.grad_injection, args.state);
}
#endif

namespace HRMCORE_ISA {
namespace {

template <class T>
HRMCORE_INLINE T* row_of(const TensorView& tensor, std::int64_t row) {
  return tensor.given() ? tensor.as<T>() + row * tensor.strides[0] : nullptr;
}

HRMCORE_INLINE float inverse_rms(float sum_of_squares, std::int64_t width, double eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares / static_cast<float>(width) + static_cast<float>(eps));
}

template <class T>
void forward_rows(const RmsNormForward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.x.shape[1];
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(args.x, row);
    const T* residual = row_of<T>(args.residual, row);
    T* y = row_of<T>(args.y, row);
    T* u = row_of<T>(args.sum, row);
    vfloat squares = {};
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      vfloat v = get(x + c);
      if (residual != nullptr) {
        put(u + c, v + get(residual + c));
        v = get(u + c);  // what later readers of the sum see, rounded to its dtype
      }
      squares += v * v;
    });
    const float scale = inverse_rms(sum(squares), width, args.eps);
    const T* normalised = residual != nullptr ? u : x;
    for_columns(width, [&](std::int64_t c, auto get, auto put)
                           __attribute__((always_inline)) { put(y + c, get(normalised + c) * scale); });
  }
}

template <class T>
void backward_rows(const RmsNormBackward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.u.shape[1];
  for (std::int64_t row = begin; row < end; ++row) {
    const T* u = row_of<T>(args.u, row);
    const T* grad_y = row_of<T>(args.grad_y, row);
    const T* grad_sum = row_of<T>(args.grad_sum, row);
    T* grad_u = row_of<T>(args.grad_u, row);
    vfloat squares = {}, products = {};
    for_columns(width, [&](std::int64_t c, auto get, auto) __attribute__((always_inline)) {
      const vfloat v = get(u + c);
      squares += v * v;
      products += v * get(grad_y + c);
    });
    const float scale = inverse_rms(sum(squares), width, args.eps);
    const float projection = sum(products) / static_cast<float>(width) * scale * scale * scale;
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      vfloat grad = get(grad_y + c) * scale - get(u + c) * projection;
      if (grad_sum != nullptr) grad += get(grad_sum + c);
      put(grad_u + c, grad);
    });
  }
}

template <class T>
void inject_forward_rows(const RmsNormInjectForward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.x.shape[1];
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(args.x, row);
    const T* residual = row_of<T>(args.residual, row);
    const T* injection = row_of<T>(args.injection, row);
    T* state = row_of<T>(args.state, row);
    T* y = row_of<T>(args.y, row);
    T* total = row_of<T>(args.sum, row);
    vfloat squares = {}, total_squares = {};
    for_columns(width, [&](std::int64_t c, auto get, auto) __attribute__((always_inline)) {
      const vfloat u = get(x + c) + get(residual + c);
      squares += u * u;
    });
    const float scale = inverse_rms(sum(squares), width, args.eps);
    *row_of<float>(args.scale, row) = scale;
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      put(state + c, (get(x + c) + get(residual + c)) * scale);
      put(total + c, get(state + c) + get(injection + c));  // of what later readers of the state see
      const vfloat v = get(total + c);                      // and of the sum, rounded to its dtype
      total_squares += v * v;
    });
    const float total_scale = inverse_rms(sum(total_squares), width, args.eps);
    for_columns(width, [&](std::int64_t c, auto get, auto put)
                           __attribute__((always_inline)) { put(y + c, get(total + c) * total_scale); });
  }
}

template <class T>
void inject_backward_rows(const RmsNormInjectBackward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.state.shape[1];
  const auto columns = static_cast<float>(width);
  for (std::int64_t row = begin; row < end; ++row) {
    const T* state = row_of<T>(args.state, row);
    const T* total = row_of<T>(args.sum, row);
    const T* grad_state = row_of<T>(args.grad_state, row);
    const T* grad_y = row_of<T>(args.grad_y, row);
    const T* grad_sum = row_of<T>(args.grad_sum, row);
    T* grad_u = row_of<T>(args.grad_u, row);
    T* grad_injection = row_of<T>(args.grad_injection, row);
    vfloat squares = {}, products = {}, state_products = {};
    for_columns(width, [&](std::int64_t c, auto get, auto) __attribute__((always_inline)) {
      const vfloat v = get(total + c);
      squares += v * v;
      products += v * get(grad_y + c);
    });
    const float total_scale = inverse_rms(sum(squares), width, args.eps);
    const float projection = sum(products) / columns * total_scale * total_scale * total_scale;
    const auto to_injection = [&](std::int64_t c, auto get) __attribute__((always_inline)) {
      const vfloat grad = get(grad_y + c) * total_scale - get(total + c) * projection;
      return grad_sum != nullptr ? grad + get(grad_sum + c) : grad;
    };
    const auto to_state = [&](std::int64_t c, auto get, vfloat injected) __attribute__((always_inline)) {
      return grad_state != nullptr ? injected + get(grad_state + c) : injected;
    };
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat injected = to_injection(c, get);
      if (grad_injection != nullptr) put(grad_injection + c, injected);
      state_products += to_state(c, get, injected) * get(state + c);
    });
    const float scale = *row_of<float>(args.scale, row);
    const float mean = sum(state_products) / columns;
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      // Computed again from the cache, since what grad_u could have kept of it would be rounded.
      const vfloat grad = to_state(c, get, to_injection(c, get));
      put(grad_u + c, (grad - get(state + c) * mean) * scale);
    });
  }
}

}  // namespace

void rms_norm_forward(const RmsNormForward& args) noexcept {
  with_element(args.x.dtype, [&](auto* element) {
    parallel_for(args.x.shape[0], rows_of_block(args.x.shape[1]), [&](std::int64_t begin, std::int64_t end) {
      forward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
    });
  });
}

void rms_norm_backward(const RmsNormBackward& args) noexcept {
  with_element(args.u.dtype, [&](auto* element) {
    parallel_for(args.u.shape[0], rows_of_block(args.u.shape[1]), [&](std::int64_t begin, std::int64_t end) {
      backward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
    });
  });
}

void rms_norm_inject_forward(const RmsNormInjectForward& args) noexcept {
  with_element(args.x.dtype, [&](auto* element) {
    parallel_for(args.x.shape[0], rows_of_block(args.x.shape[1]), [&](std::int64_t begin, std::int64_t end) {
      inject_forward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
    });
  });
}

void rms_norm_inject_backward(const RmsNormInjectBackward& args) noexcept {
  with_element(args.state.dtype, [&](auto* element) {
    parallel_for(args.state.shape[0], rows_of_block(args.state.shape[1]),
                 [&](std::int64_t begin, std::int64_t end) {
                   inject_backward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
                 });
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
