#include "ops/cross_entropy.h"

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_logits(const char* op, const TensorView& logits, const TensorView& targets) {
  Check(op, "logits", logits).cpu_or_cuda().rank(2).dtype({DType::f32, DType::bf16}).last_contiguous();
  const std::int64_t rows = logits.shape[0], vocabulary = logits.shape[1];
  if (vocabulary < 1) reject(op, "logits", "at least one column wide (V)", "0");
  Check(op, "targets", targets).cpu_or_cuda().rank(1).dtype({DType::i64}).size(0, rows, "R").contiguous();
  if (targets.device != Device::cpu) return;  // a row whose target is outside has a NaN loss there
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t target = targets.as<std::int64_t>()[row];
    if (target != no_target && (target < 0 || target >= vocabulary)) {
      reject(op, "targets", "in [0, " + std::to_string(vocabulary) + "), the vocabulary (V), or -1",
             std::to_string(target) + " in row " + std::to_string(row));
    }
  }
}

}  // namespace

void check(const CrossEntropyForward& args) {
  const char* op = "cross_entropy_forward";
  check_logits(op, args.logits, args.targets);
  const std::int64_t rows = args.logits.shape[0];
  Check(op, "losses", args.losses).cpu_or_cuda().rank(1).dtype({DType::f64}).size(0, rows, "R").contiguous();
  Check(op, "lse", args.lse).cpu_or_cuda().rank(1).dtype({DType::f32}).size(0, rows, "R").contiguous();
}

void check(const CrossEntropyBackward& args) {
  const char* op = "cross_entropy_backward";
  check_logits(op, args.logits, args.targets);
  Check(op, "lse", args.lse)
      .cpu_or_cuda()
      .rank(1)
      .dtype({DType::f32})
      .size(0, args.logits.shape[0], "R")
      .contiguous();
  Check(op, "scale", args.scale).cpu_or_cuda().rank(1).dtype({DType::f32}).size(0, 1, "one number");
}
#endif

namespace HRMCORE_ISA {
namespace {

constexpr std::int64_t sum_block = 1024;  // exponentials whose sum stays in float32

template <class T>
HRMCORE_INLINE T* row_of(const TensorView& logits, std::int64_t row) {
  return logits.as<T>() + row * logits.strides[0];
}

HRMCORE_INLINE float value_of(const float* p) { return *p; }
HRMCORE_INLINE float value_of(const bf16* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// As for_columns, with missing lanes of the last vector read as the first column's value.
template <class T>
HRMCORE_INLINE float largest(const T* row, std::int64_t width) {
  vfloat top = splat(value_of(row));
  std::int64_t column = 0;
  for (; column + lanes <= width; column += lanes) top = max(top, load(row + column));
  float result = max(top);
  for (; column < width; ++column) {
    const float value = value_of(row + column);
    result = result > value ? result : value;
  }
  return result;
}

// sum exp(row - top)
template <class T>
HRMCORE_INLINE double sum_of_exponentials(const T* row, std::int64_t width, float top) {
  double total = 0;
  std::int64_t column = 0;
  while (column + lanes <= width) {
    const std::int64_t end = column + sum_block < width ? column + sum_block : width;
    vfloat partial = {};
    for (; column + lanes <= end; column += lanes) partial += exp(load(row + column) - top);
    total += static_cast<double>(sum(partial));
  }
  if (const std::int64_t rest = width - column; rest > 0) {
    const vfloat last = exp(load_part(row + column, rest) - top);
    for (int i = 0; i < rest; ++i) total += static_cast<double>(last[i]);
  }
  return total;
}

template <class T>
void forward_rows(const CrossEntropyForward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.logits.shape[1];
  for (std::int64_t r = begin; r < end; ++r) {
    const T* row = row_of<T>(args.logits, r);
    const std::int64_t target = args.targets.as<std::int64_t>()[r];
    if (target == no_target) {
      args.losses.as<double>()[r] = 0;
      args.lse.as<float>()[r] = 0;
      continue;
    }
    const float top = largest(row, width);
    const double above = __builtin_log(sum_of_exponentials(row, width, top));
    const float chosen = value_of(row + target);
    args.losses.as<double>()[r] = above + (static_cast<double>(top) - static_cast<double>(chosen));
    args.lse.as<float>()[r] = static_cast<float>(above + static_cast<double>(top));
  }
}

template <class T>
void backward_rows(const CrossEntropyBackward& args, std::int64_t begin, std::int64_t end) {
  const std::int64_t width = args.logits.shape[1];
  const float scale = *args.scale.as<float>();
  for (std::int64_t r = begin; r < end; ++r) {
    T* row = row_of<T>(args.logits, r);
    const float lse = args.lse.as<float>()[r];
    const std::int64_t target = args.targets.as<std::int64_t>()[r];
    if (target == no_target) {
      for_columns(width, [&](std::int64_t c, auto, auto put)
                             __attribute__((always_inline)) { put(row + c, vfloat{}); });
      continue;
    }
    const std::int64_t aligned = target / lanes * lanes;  // the vector that holds the target
    const std::int64_t count = width - aligned < lanes ? width - aligned : lanes;
    vfloat hit = exp(load_part(row + aligned, count) - lse) * scale;
    hit[target - aligned] -= scale;
    for_columns(width, [&](std::int64_t c, auto get, auto put)
                           __attribute__((always_inline)) { put(row + c, exp(get(row + c) - lse) * scale); });
    store_part(row + aligned, hit, count);
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& args) noexcept {
  with_element(args.logits.dtype, [&](auto* element) {
    parallel_for(args.logits.shape[0], rows_of_block(args.logits.shape[1]),
                 [&](std::int64_t begin, std::int64_t end) {
                   forward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
                 });
  });
}

void cross_entropy_backward(const CrossEntropyBackward& args) noexcept {
  with_element(args.logits.dtype, [&](auto* element) {
    parallel_for(args.logits.shape[0], rows_of_block(args.logits.shape[1]),
                 [&](std::int64_t begin, std::int64_t end) {
                   backward_rows<std::remove_pointer_t<decltype(element)>>(args, begin, end);
                 });
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
