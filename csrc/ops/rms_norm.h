// RMSNorm without gain, optionally after a residual (or injection) add; and what lies between two visits.
//
// rms_norm
//   forward:   u = x + residual            (u = x when residual is left out)
//              y = u / sqrt(mean(u^2) + eps)
//   backward:  with r = 1/sqrt(mean(u^2) + eps), recomputed:
//              grad_u = r * (grad_y - y * mean(grad_y * y)) + grad_sum
//
//   Moves, in elements: forward 2 T D (4 T D with residual), backward 3 T D (4 T D with grad_sum). Computes
//   4 T D FLOPs forward (5 T D with residual), 7 T D backward (8 T D with grad_sum).
//
// rms_norm_inject: the norm that closes a stack, the injection and the first norm of the next visit
//   forward:   u = x + residual,  scale = 1 / sqrt(mean(u^2) + eps),  state = u * scale
//              sum = state + injection,  y = sum / sqrt(mean(sum^2) + eps)
//   backward:  with r = 1/sqrt(mean(sum^2) + eps), recomputed:
//              grad_injection = r * (grad_y - y * mean(grad_y * y)) + grad_sum
//              g = grad_injection + grad_state
//              grad_u = scale * (g - state * mean(g * state)), so that u itself is kept by nobody
//   Moves, in elements: forward 6 T D, backward 4 T D and one T D more for each of grad_sum, grad_state and
//   grad_injection; besides, both, T numbers in float32. Computes 10 T D FLOPs forward, 12 T D backward and
//   T D more for each of grad_sum and grad_state.
//
// All tensors (T, D), float32 or bfloat16 (one dtype for all), unit stride in D, any row stride; arithmetic
// in float32. scale alone is float32 (T).
//
// Source: arXiv 1910.07467; the gain-free form of HRM-Text, arXiv 2605.20613.
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

struct RmsNormInjectForward {
  TensorView x;          // (T, D)
  TensorView residual;   // (T, D)
  TensorView injection;  // (T, D)
  TensorView state;      // (T, D), written
  TensorView y;          // (T, D), written
  TensorView sum;        // (T, D), written
  TensorView scale;      // (T) float32, written: 1/rms of x + residual
  double eps;
};

struct RmsNormInjectBackward {
  TensorView state;           // (T, D)
  TensorView sum;             // (T, D)
  TensorView scale;           // (T) float32
  TensorView grad_state;      // (T, D) or left out
  TensorView grad_y;          // (T, D)
  TensorView grad_sum;        // (T, D) or left out
  TensorView grad_u;          // (T, D), written: the gradient of x and of residual alike
  TensorView grad_injection;  // (T, D), written, or left out
  double eps;
};

void check(const RmsNormForward& args);
void check(const RmsNormBackward& args);
void check(const RmsNormInjectForward& args);
void check(const RmsNormInjectBackward& args);
HRMCORE_DECLARE_KERNEL(rms_norm_forward, RmsNormForward)
HRMCORE_DECLARE_KERNEL(rms_norm_backward, RmsNormBackward)
HRMCORE_DECLARE_KERNEL(rms_norm_inject_forward, RmsNormInjectForward)
HRMCORE_DECLARE_KERNEL(rms_norm_inject_backward, RmsNormInjectBackward)

}  // namespace hrmcore
