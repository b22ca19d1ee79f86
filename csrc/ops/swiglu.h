// SwiGLU: the gated product between the two halves of a fused projection.
//
//   forward:   [a | b] = ab,  s = sigmoid(a),  y = a s b
//   backward:  with s recomputed:  grad_a = grad_y b s (1 + a (1 - s)),  grad_b = grad_y a s,
//              and y again where it is asked for
//
// ab (T, 2F), y (T, F), float32 or bfloat16 (one dtype for all), unit stride in the last axis, any row
// stride; arithmetic in float32.
//
// Source: arXiv 2002.05202.
//
// Moves, in elements: forward 3 T F, backward 5 T F, with y 6 T F. Computes 5 T F FLOPs forward and 12 T F
// backward, an exponential or a division counted as one.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

struct SwigluForward {
  TensorView ab;  // (T, 2F)
  TensorView y;   // (T, F), written
};

struct SwigluBackward {
  TensorView ab;       // (T, 2F)
  TensorView grad_y;   // (T, F)
  TensorView grad_ab;  // (T, 2F), written
  TensorView y;        // none, or (T, F), written; may be grad_y itself
};

void check(const SwigluForward& args);
void check(const SwigluBackward& args);
HRMCORE_DECLARE_KERNEL(swiglu_forward, SwigluForward)
HRMCORE_DECLARE_KERNEL(swiglu_backward, SwigluBackward)

}  // namespace hrmcore
