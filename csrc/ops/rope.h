// Rotary position embedding of queries and keys, half split: channel i is paired with channel i + d/2.
//
//   forward:   out_i       = x_i       cos(p, i) - x_{i+d/2} sin(p, i)          p = positions[t], i < d/2
//              out_{i+d/2} = x_{i+d/2} cos(p, i) + x_i       sin(p, i)
//   backward:  the rotation by the opposite angle (`inverse`), applied to the gradients
//
// q and k (T, H, d), float32 or bfloat16 (one dtype), unit stride in d, any strides before it, so they may be
// views of a fused projection; outputs likewise, and an output may be its own input. Arithmetic in float32.
//
// Source: arXiv 2104.09864, with the channel order of LLaMA and HRM-Text.
//
// Moves, in elements: 4 T H d, and T rows of the table; computes 6 T H d FLOPs.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

struct Rope {
  TensorView q;          // (T, H, d)
  TensorView k;          // (T, H, d)
  TensorView table;      // (P, d) float32: a row is cos (d/2), then sin (d/2)
  TensorView positions;  // (T) int32, each in [0, P)
  TensorView q_out;      // (T, H, d), written
  TensorView k_out;      // (T, H, d), written
  bool inverse;
};

void check(const Rope& args);
HRMCORE_DECLARE_KERNEL(rope, Rope)

}  // namespace hrmcore
