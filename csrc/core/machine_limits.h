// What this machine can do at most, measured: kernels that only move memory, or only multiply and add. The
// benchmarks state every op's speed as a share of these.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace hrmcore {

constexpr std::int64_t stream_block = 1 << 14;  // floats: what one thread takes at a time

// Reads all of source and keeps one sum for each block, so that no load can be left out. Moves 4 N bytes.
struct StreamRead {
  TensorView source;  // (N) float32, contiguous
  TensorView sums;    // (ceil(N / stream_block)) float32, contiguous, written
};

// Copies source with ordinary stores, as the ops write. Moves 8 N bytes.
struct StreamCopy {
  TensorView source;  // (N) float32, contiguous
  TensorView target;  // (N) float32, contiguous, written
};

constexpr std::int64_t multiply_add_width = 384;  // numbers that each element of sums is the sum of

// Steps x = x * m + a, `rounds` times, for independent numbers x in registers.
// Computes 2 * multiply_add_width * rounds FLOPs for each element of sums.
struct MultiplyAdd {
  TensorView sums;  // (blocks) float32, contiguous, written
  std::int64_t rounds;
};

void check(const StreamRead& args);
void check(const StreamCopy& args);
void check(const MultiplyAdd& args);
HRMCORE_DECLARE_KERNEL(stream_read, StreamRead)
HRMCORE_DECLARE_KERNEL(stream_copy, StreamCopy)
HRMCORE_DECLARE_KERNEL(multiply_add, MultiplyAdd)

}  // namespace hrmcore
