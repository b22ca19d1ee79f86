// Cross-entropy of rows of logits, and its gradient in place of them. The logits come in chunks of rows from
// a matrix product (hrmcore/ops/cross_entropy.py), so that those of all rows never exist together.
//
//   forward:   lse_r = log sum_v exp(logits_rv),  loss_r = lse_r - logits_r[target_r]
//   backward:  logits_rv <- scale (exp(logits_rv - lse_r) - [v = target_r])
//
// R rows, V vocabulary. Logits float32 or bfloat16, unit stride in V, any row stride; arithmetic in float32,
// the sum of the exponentials in float64 across blocks of 1,024. A row with a NaN, or without a finite
// maximum, has a NaN loss. A row whose target is -1 has no loss: 0, and a gradient of zeros. On CUDA the targets
// are not read on the host: a row whose target is outside of the vocabulary has a NaN loss and a gradient of NaNs.
//
// Moves at least R V elements forward (read twice, the second time from cache where a row fits there) and
// 2 R V backward. Computes R V exponentials and 2 R V further FLOPs forward, R V and 3 R V backward.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

constexpr std::int64_t no_target = -1;

struct CrossEntropyForward {
  TensorView logits;   // (R, V)
  TensorView targets;  // (R) int64 in [0, V), or no_target
  TensorView losses;   // (R) float64, written
  TensorView lse;      // (R) float32, written
};

struct CrossEntropyBackward {
  TensorView logits;   // (R, V), overwritten by their gradient
  TensorView targets;  // (R) int64 in [0, V), or no_target
  TensorView lse;      // (R) float32, from the forward
  TensorView scale;    // (1) float32: the gradient of every row's loss
};

void check(const CrossEntropyForward& args);
void check(const CrossEntropyBackward& args);
HRMCORE_DECLARE_KERNEL(cross_entropy_forward, CrossEntropyForward)
HRMCORE_DECLARE_KERNEL(cross_entropy_backward, CrossEntropyBackward)

}  // namespace hrmcore
