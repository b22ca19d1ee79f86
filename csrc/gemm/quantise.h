// One group of activations to int8; for kernels of the same instruction set.
#pragma once

#include "gemm/lanes.h"
#include "gemm/weight_layout.h"

namespace hrmcore::HRMCORE_ISA {

constexpr int group_vectors = static_cast<int>(group_columns) / lanes;

// q = round(x / scale) with scale = max |x| / 127; an all-zero group has scale 0.
HRMCORE_INLINE void quantise_group(const vfloat (&x)[group_vectors], QuantGroup* out) {
  vfloat top = {};
  for (int v = 0; v < group_vectors; ++v) top = max(top, (vfloat)((vint)x[v] & 0x7fffffff));
  const float largest = max(top);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  vint total = {};
  for (int v = 0; v < group_vectors; ++v) {
    const vint q = round_product(x[v], splat(inverse));
    total += q;
    const vbyte bytes = __builtin_convertvector(q, vbyte);
    __builtin_memcpy(out->q + v * lanes, &bytes, sizeof(bytes));
  }
  out->scale = largest / 127.0f;
  out->sum = static_cast<std::int32_t>(sum(to_float(total)));  // exact: at most 32 * 127
}

}  // namespace hrmcore::HRMCORE_ISA
