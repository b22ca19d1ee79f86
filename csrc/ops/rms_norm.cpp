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

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
