// RMSNorm without gain, optionally after a residual (or injection) add.
//
//   forward:   u = x + residual            (u = x when residual is left out)
//              y = u / sqrt(mean(u^2) + eps)
//   backward:  with r = 1/sqrt(mean(u^2) + eps), recomputed:
//              grad_u = r * (grad_y - y * mean(grad_y * y)) + grad_sum
//
// All tensors (T, D), float32 or bfloat16 (one dtype for all), unit stride in D, any row stride; arithmetic
// in float32.
//
// Source: arXiv 1910.07467; the gain-free form of HRM-Text, arXiv 2605.20613.
//
// Moves, in elements: forward 2 T D (4 T D with residual), backward 3 T D (4 T D with grad_sum). Computes
// 4 T D FLOPs forward (5 T D with residual), 7 T D backward (8 T D with grad_sum).
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

struct RmsNormForward {
  TensorView x;         // (T, D)
  TensorView residual;  // (T, D) or left out
  TensorView y;         // (T, D), written
  TensorView sum;       // (T, D), written; left out exactly when residual is
  double eps;
};

struct RmsNormBackward {
  TensorView u;         // (T, D): the normalised input, that is x + residual
  TensorView grad_y;    // (T, D)
  TensorView grad_sum;  // (T, D) or left out
  TensorView grad_u;    // (T, D), written: the gradient of x and of residual alike
  double eps;
};

void check(const RmsNormForward& args);
void check(const RmsNormBackward& args);
HRMCORE_DECLARE_KERNEL(rms_norm_forward, RmsNormForward)
HRMCORE_DECLARE_KERNEL(rms_norm_backward, RmsNormBackward)

}  // namespace hrmcore
