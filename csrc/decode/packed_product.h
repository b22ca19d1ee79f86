// The product of many tokens with one matrix of the decode step's weights, in int8 or int4: what a prefill multiplies
// with, so that a model has no second copy of them.
//
//   formula   out = x W^T; a weight is the whole number times its scale, rounded to bfloat16. Products are exact and
//             added up in float32, 16 columns after 16 columns: the bits of a row depend neither on the other rows, nor
//             on how many there are, nor on the grid.
//   rows      those of W as engine/mma_layout.py has paired them go back to their places. Of `gated` weights the
//             partners a and b become silu(a) b, before anything is rounded.
//   limits    bfloat16's: a weight is rounded once more, by up to 2^-8 of itself. K is a multiple of 16.
//   bytes     each block of n rows and m tokens asks for K (2 m + w n) bytes, w a weight's with its scale; W comes from
//             memory once, x and out (2 T K, 2 T R) at most once. 2 T R K FLOPs.
//   issues    of a warp for 16 columns: per 16 rows 18 (int8) or 15 (int4) for weights, 1 or less to read them; per 16
//             tokens 2 for activations; per 16 rows and 16 tokens 2 products.
#pragma once

#include <cstdint>

#include "core/tensor.h"
#include "gemm/weight_layout.h"

namespace hrmcore {

struct PackedProduct {
  TensorView x;             // (T, K) bfloat16
  TensorView weights;       // bytes of W (R, K), in tiles of 16 rows
  TensorView out;           // written: (T, R) bfloat16, R even, or float32; gated (T, R / 2) bfloat16
  std::int64_t pieces;      // into which the rows were cut to be paired; 0: they are in order
  bool gated;               // pieces is 1
  Packing packing;          // int8 or int4
  std::int64_t processors;  // for which the work is shared out; 0: those of the device
};

// Throws std::invalid_argument.
void check(const PackedProduct& args);

}  // namespace hrmcore
