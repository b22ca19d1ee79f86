#include "ops/swiglu.h"

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_input(const char* op, const TensorView& ab) {
  Check(op, "ab", ab).cpu_or_cuda().rank(2).dtype({DType::f32, DType::bf16}).last_contiguous();
  if (ab.shape[1] < 2 || ab.shape[1] % 2 != 0) {
    reject(op, "ab", "an even number of columns wide (2F), at least 2", std::to_string(ab.shape[1]));
  }
}

void check_half(const char* op, const char* argument, const TensorView& tensor, const TensorView& ab) {
  Check(op, argument, tensor).cpu_or_cuda().rank(2).dtype({ab.dtype});
  Check(op, argument, tensor).size(0, ab.shape[0], "T").size(1, ab.shape[1] / 2, "F").last_contiguous();
}

}  // namespace

void check(const SwigluForward& args) {
  const char* op = "swiglu_forward";
  check_input(op, args.ab);
  check_half(op, "y", args.y, args.ab);
}

void check(const SwigluBackward& args) {
  const char* op = "swiglu_backward";
  check_input(op, args.ab);
  check_half(op, "grad_y", args.grad_y, args.ab);
  Check(op, "grad_ab", args.grad_ab).cpu_or_cuda().rank(2).dtype({args.ab.dtype});
  Check(op, "grad_ab", args.grad_ab).same_shape(args.ab, "ab").last_contiguous();
  if (args.y.given()) check_half(op, "y", args.y, args.ab);
}
#endif

namespace HRMCORE_ISA {
namespace {

template <class T>
void forward_rows(const SwigluForward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.y.shape[1];
  for (std::int64_t row = begin; row < end; ++row) {
    const T* a = args.ab.as<T>() + row * args.ab.strides[0];
    const T* b = a + width;
    T* y = args.y.as<T>() + row * args.y.strides[0];
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat gate = get(a + c);
      put(y + c, gate * sigmoid(gate) * get(b + c));
    });
  }
}

template <class T>
void backward_rows(const SwigluBackward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.grad_y.shape[1];
  for (std::int64_t row = begin; row < end; ++row) {
    const T* a = args.ab.as<T>() + row * args.ab.strides[0];
    const T* b = a + width;
    const T* grad_y = args.grad_y.as<T>() + row * args.grad_y.strides[0];
    T* grad_a = args.grad_ab.as<T>() + row * args.grad_ab.strides[0];
    T* grad_b = grad_a + width;
    T* y = args.y.given() ? args.y.as<T>() + row * args.y.strides[0] : nullptr;
    for_columns(width, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat gate = get(a + c), up = get(b + c), grad = get(grad_y + c);
      const vfloat s = sigmoid(gate);
      put(grad_a + c, grad * up * s * (1.0f + gate * (1.0f - s)));
      put(grad_b + c, grad * gate * s);
      if (y != nullptr) put(y + c, gate * s * up);
    });
  }
}

}  // namespace

void swiglu_forward(const SwigluForward& args) noexcept {
  with_element(args.ab.dtype, [&](auto* element) {
    parallel_for(args.ab.shape[0], rows_of_block(args.ab.shape[1]),
                 [&](std::int64_t begin, std::int64_t end) {
                   forward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
                 });
  });
}

void swiglu_backward(const SwigluBackward& args) noexcept {
  with_element(args.ab.dtype, [&](auto* element) {
    parallel_for(args.ab.shape[0], rows_of_block(args.ab.shape[1]),
                 [&](std::int64_t begin, std::int64_t end) {
                   backward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
                 });
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
