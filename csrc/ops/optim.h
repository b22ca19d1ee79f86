// One optimizer step over any number of parameters, in one pass over memory and in place. With g the gradient
// of a parameter p, every step also decays the weights, p -= lr weight_decay p, and updates the average of
// the new weights where one is kept, ema += (1 - ema_decay) (p - ema).
//
//   sophia_step:       m += (1 - beta1) (g - m)
//                      p -= lr clip(m / max(rho batch_tokens h, eps), -1, 1)
//   sophia_curvature:  h += (1 - beta2) (u w - h)       for a sample u w of the Hessian's diagonal: a probe
//                      times its Hessian-vector product
//   adamw_step:        m += (1 - beta1) (g - m),  v += (1 - beta2) (g^2 - v)
//                      p -= lr m' / (sqrt(v') + eps)
//                      with m' = m / (1 - beta1^step), v' = v / (1 - beta2^step)
//   adam_atan2_step:   the same with p -= lr atan2(m, sqrt(v')) / (1 - beta1^step)
//   adam_atan2_paper_step:  the same with p -= lr atan2(m', sqrt(v'))
//
// Where `grad_scale` is given, g is the gradient times it: clipping by the norm takes no pass of its own.
//
// All tensors float32 and contiguous, those of one parameter of one shape. Arithmetic in float32, the numbers
// above folded in float64. The moments move by differences because beta m + (1 - beta) g, its two factors
// rounded apart, has a wrong fixed point. A NaN is passed on. The numbers are checked by hrmcore/optim.py.
//
// Sources: Sophia arXiv 2305.14342, algorithm 3; AdamW arXiv 1711.05101; Adam-atan2 arXiv 2407.05872, and as
// the trainer of HRM-Text takes it: github.com/sapientinc/HRM-Text, models/adam_atan2.py.
//
// Moves, in bytes an element: sophia_step 24, sophia_curvature 16 (12 where u and w are one tensor),
// adamw_step and both of Adam-atan2 28; a step 8 more with the average. Computes at most 46 FLOPs an element.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

// One parameter and what the optimizer keeps of it.
struct StepTensors {
  TensorView param;  // updated, like exp_avg and ema, and in the Adams second
  TensorView grad;
  TensorView exp_avg;       // m
  TensorView second;        // h: "hessian", or v: "exp_avg_sq"
  TensorView ema;           // or left out
  std::int64_t step = 0;    // of the Adams: 1 at the first
  std::int64_t number = 0;  // what an error calls this parameter
};

struct CurvatureTensors {
  TensorView hessian;       // h, updated
  TensorView probe;         // u
  TensorView hvp;           // w, the Hessian times u
  std::int64_t number = 0;  // what an error calls this parameter
};

struct SophiaStep {
  const StepTensors* tensors;
  std::int64_t count;
  TensorView clipped;     // (C) int64, C >= 1: elements whose ratio reached 1 are added, each to one of these
  TensorView grad_scale;  // (1) float32, or left out: 1
  double lr, beta1, weight_decay, rho, batch_tokens, eps, ema_decay;
};

struct SophiaCurvature {
  const CurvatureTensors* tensors;
  std::int64_t count;
  double beta2;
};

struct AdamStep {
  const StepTensors* tensors;
  std::int64_t count;
  TensorView grad_scale;  // (1) float32, or left out: 1
  double lr, beta1, beta2, weight_decay;
  double eps;  // of adamw_step alone
  double ema_decay;
};

void check(const SophiaStep& args);
void check(const SophiaCurvature& args);
void check(const AdamStep& args);
HRMCORE_DECLARE_KERNEL(sophia_step, SophiaStep)
HRMCORE_DECLARE_KERNEL(sophia_curvature, SophiaCurvature)
HRMCORE_DECLARE_KERNEL(adamw_step, AdamStep)
HRMCORE_DECLARE_KERNEL(adam_atan2_step, AdamStep)
HRMCORE_DECLARE_KERNEL(adam_atan2_paper_step, AdamStep)

}  // namespace hrmcore
