// One chunk of one panel times some rows: what packed_gemm is made of, and attention scores too (a cache
// page of 64 keys is a panel whose columns are the head's channels).
#pragma once

#include "core/simd.h"
#include "gemm/weight_layout.h"

namespace hrmcore::HRMCORE_ISA {

struct GemmChunk {
  const std::byte* weights;
  std::int64_t groups;
  const std::byte* x;
  std::int64_t x_row_bytes;
  std::int64_t tokens;
  float* out;  // [tokens][64]
  std::int64_t out_stride;
  bool accumulate;  // f32, bf16: add the finished chunk to out; int8, int4: continue the chain that out holds
  bool streams;     // ask for the following chunk's weights, right behind these, which come from memory
};

void multiply_chunk(Packing packing, const GemmChunk& chunk) noexcept;

}  // namespace hrmcore::HRMCORE_ISA
