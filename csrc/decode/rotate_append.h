// What follows the first product of a layer in a prefill: queries and keys are turned by their positions (ops/rope.h),
// and keys and values go to their rows of the cache. One launch in place of three.
//
//   moves   in elements: q, k and v (T, H, d) once in; q, k and k, v of the cache once out; T rows of the table.
//   bits    those of ops/rope.h. An int8 cache gets the numbers of int8_page.h, rounded from the turned key before that
//           is rounded to bfloat16.
#pragma once

#include "core/tensor.h"

namespace hrmcore {

struct RotateAppend {
  TensorView q, k, v;    // (T, H, d) bfloat16, unit stride in d
  TensorView table;      // (P, d) float32, as ops/rope.h takes it
  TensorView positions;  // (T) int32; one outside of the table gives NaNs
  TensorView
      rows;  // (T) int64, no two alike: the cache's row of each token; one outside of it is not written
  TensorView q_out, k_out;  // (T, H, d) bfloat16, written
  // Written: (rows, H, d) bfloat16; or both the pages of int8_page.h, (pages, H, bytes) uint8.
  TensorView keys, values;

  bool int8_cache() const { return keys.dtype == DType::u8; }
};

// Throws std::invalid_argument.
void check(const RotateAppend& args);

}  // namespace hrmcore
