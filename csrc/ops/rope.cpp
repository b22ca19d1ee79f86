#include "ops/rope.h"

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_heads(const char* argument, const TensorView& tensor, const TensorView& like) {
  Check("rope", argument, tensor)
      .cpu_or_cuda()
      .rank(3)
      .dtype({like.dtype})
      .same_shape(like, "q")
      .last_contiguous();
}

void check_positions(const TensorView& positions, std::int64_t tokens, std::int64_t length) {
  Check("rope", "positions", positions).cpu_or_cuda().rank(1).dtype({DType::i32}).size(0, tokens, "T");
  if (positions.device != Device::cpu) return;  // a position outside gives NaNs there
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t position = positions.as<std::int32_t>()[t * positions.strides[0]];
    if (position < 0 || position >= length) {
      reject("rope", "positions", "in [0, " + std::to_string(length) + "), the length of the table",
             std::to_string(position) + " for token " + std::to_string(t));
    }
  }
}

}  // namespace

void check(const Rope& args) {
  Check("rope", "q", args.q).cpu_or_cuda().rank(3).dtype({DType::f32, DType::bf16}).last_contiguous();
  const std::int64_t head_dim = args.q.shape[2];
  if (head_dim < 2 || head_dim % 2 != 0) {
    reject("rope", "q", "of an even head_dim, at least 2, in its last axis", std::to_string(head_dim));
  }
  check_heads("k", args.k, args.q);
  Check("rope", "table", args.table)
      .cpu_or_cuda()
      .rank(2)
      .dtype({DType::f32})
      .size(1, head_dim, "d")
      .last_contiguous();
  check_positions(args.positions, args.q.shape[0], args.table.shape[0]);
  check_heads("q_out", args.q_out, args.q);
  check_heads("k_out", args.k_out, args.q);
}
#endif

namespace HRMCORE_ISA {
namespace {

// One token: every head is rotated by the same angles.
template <class T>
HRMCORE_INLINE void rotate_heads(const TensorView& in, const TensorView& out, std::int64_t token,
                                 const float* cosine, float direction) {
  const std::int64_t half = in.shape[2] / 2;
  const float* sine = cosine + half;
  for (std::int64_t head = 0; head < in.shape[1]; ++head) {
    const T* x = in.as<T>() + token * in.strides[0] + head * in.strides[1];
    T* y = out.as<T>() + token * out.strides[0] + head * out.strides[1];
    for_columns(half, [&](std::int64_t c, auto get, auto put) __attribute__((always_inline)) {
      const vfloat low = get(x + c), high = get(x + half + c);
      const vfloat cos = get(cosine + c), sin = get(sine + c) * direction;
      put(y + c, low * cos - high * sin);
      put(y + half + c, high * cos + low * sin);
    });
  }
}

template <class T>
void rotate_tokens(const Rope& args, std::int64_t begin, std::int64_t end) {
  const float direction = args.inverse ? -1.0f : 1.0f;
  for (std::int64_t token = begin; token < end; ++token) {
    const std::int32_t position = args.positions.as<std::int32_t>()[token * args.positions.strides[0]];
    const float* angles = args.table.as<float>() + position * args.table.strides[0];
    rotate_heads<T>(args.q, args.q_out, token, angles, direction);
    rotate_heads<T>(args.k, args.k_out, token, angles, direction);
  }
}

}  // namespace

void rope(const Rope& args) noexcept {
  with_element(args.q.dtype, [&](auto* element) {
    parallel_for(args.q.shape[0], rows_of_block(2 * args.q.shape[1] * args.q.shape[2]),
                 [&](std::int64_t begin, std::int64_t end) {
                   rotate_tokens<std::remove_pointer_t<decltype(element)>>(args, begin, end);
                 });
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
