#include "decode/rotate_append.h"

#include <string>

#include "decode/int8_page.h"

namespace hrmcore {

void check(const RotateAppend& args) {
  constexpr const char* op = "cuda_rotate_append";
  Check(op, "q", args.q).cpu_or_cuda().rank(3).dtype({DType::bf16}).last_contiguous();
  const std::int64_t tokens = args.q.shape[0], heads = args.q.shape[1], head_dim = args.q.shape[2];
  if (head_dim < 2 || head_dim % 2 != 0)
    reject(op, "q", "of an even head_dim, at least 2, in its last axis", std::to_string(head_dim));
  const auto check_heads = [&](const char* argument, const TensorView& tensor) {
    Check(op, argument, tensor).rank(3).dtype({DType::bf16}).same_shape(args.q, "q").last_contiguous();
  };
  check_heads("k", args.k);
  check_heads("v", args.v);
  check_heads("q_out", args.q_out);
  check_heads("k_out", args.k_out);
  Check(op, "table", args.table).rank(2).dtype({DType::f32}).size(1, head_dim, "d").last_contiguous();
  Check(op, "positions", args.positions).rank(1).dtype({DType::i32}).size(0, tokens, "T").contiguous();
  Check(op, "rows", args.rows).rank(1).dtype({DType::i64}).size(0, tokens, "T").contiguous();
  const auto check_cache = [&](const char* argument, const TensorView& cache, std::int64_t of_row,
                               const char* meaning) {
    Check(op, argument, cache).rank(3).size(1, heads, "H").size(2, of_row, meaning).last_contiguous();
    if (cache.shape[0] < 1) reject(op, argument, "of at least one row", "none");
  };
  Check(op, "keys", args.keys).dtype({DType::bf16, DType::u8});
  if (args.int8_cache()) {
    if (!Int8Page::takes(head_dim))
      reject(op, "q", "of head_dim 16, 32, 64 or 128 beside an int8 cache", std::to_string(head_dim));
    const std::int64_t bytes = Int8Page{static_cast<int>(head_dim)}.bytes();
    Check(op, "values", args.values).dtype({DType::u8});
    check_cache("keys", args.keys, bytes, "bytes of a page");
    check_cache("values", args.values, bytes, "bytes of a page");
    if (args.values.data != args.keys.data) reject(op, "values", "the pages that keys are in", "others");
    Check(op, "keys", args.keys).contiguous();
    if (reinterpret_cast<std::uintptr_t>(args.keys.data) % 16 != 0)
      reject(op, "keys", "aligned to 16 bytes", "a misaligned view");
  } else {
    Check(op, "values", args.values).dtype({DType::bf16});
    check_cache("keys", args.keys, head_dim, "d");
    check_cache("values", args.values, head_dim, "d");
  }
}

}  // namespace hrmcore
