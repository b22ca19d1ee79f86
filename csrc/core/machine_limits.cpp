#include "core/machine_limits.h"

#include "core/simd.h"

namespace hrmcore {

#if defined(HRMCORE_ISA_generic)
namespace {

void check_line(const char* op, const char* argument, const TensorView& tensor) {
  Check(op, argument, tensor).cpu().rank(1).dtype({DType::f32}).contiguous();
}

}  // namespace

void check(const StreamRead& args) {
  check_line("stream_read", "source", args.source);
  check_line("stream_read", "sums", args.sums);
  const std::int64_t blocks = (args.source.shape[0] + stream_block - 1) / stream_block;
  Check("stream_read", "sums", args.sums).size(0, blocks, "blocks of the source");
}

void check(const StreamCopy& args) {
  check_line("stream_copy", "source", args.source);
  check_line("stream_copy", "target", args.target);
  Check("stream_copy", "target", args.target).same_shape(args.source, "source");
}

void check(const MultiplyAdd& args) {
  check_line("multiply_add", "sums", args.sums);
  if (args.rounds < 1) reject("multiply_add", "rounds", "at least 1", std::to_string(args.rounds));
}
#endif

namespace HRMCORE_ISA {
namespace {

// Enough independent chains to fill the pipelines, few enough to stay in registers.
#if defined(HRMCORE_ISA_avx512) || defined(HRMCORE_ISA_vnni) || defined(HRMCORE_ARM64)
constexpr int chains = 24;
#else
constexpr int chains = 12;
#endif

void read_block(const float* source, std::int64_t count, float* total) {
  constexpr int streams = 8;
  vfloat sums[streams] = {};
  std::int64_t i = 0;
  for (; i + streams * lanes <= count; i += streams * lanes) {
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) sums[s] += load(source + i + s * lanes);
  }
  for_columns(count - i, [&](std::int64_t c, auto get, auto)
                             __attribute__((always_inline)) { sums[0] += get(source + i + c); });
  for (int s = 1; s < streams; ++s) sums[0] += sums[s];
  *total = sum(sums[0]);
}

// A value that the compiler cannot see through.
HRMCORE_INLINE void hide(vfloat& v) { asm volatile("" : "+m"(v)); }

float run_chains(std::int64_t rounds) {
  static_assert(multiply_add_width % (chains * lanes) == 0, "whole groups of chains");
  vfloat m = splat(0.999f), a = splat(0.001f), total = {};
  hide(m), hide(a);
  for (int group = 0; group < multiply_add_width / (chains * lanes); ++group) {
    vfloat x[chains] = {};
    for (int c = 0; c < chains; ++c) hide(x[c]);  // equal chains must not become one
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
      for (int c = 0; c < chains; ++c) x[c] = x[c] * m + a;
    }
    for (int c = 0; c < chains; ++c) total += x[c];
  }
  return sum(total);
}

}  // namespace

void stream_read(const StreamRead& args) noexcept {
  parallel_for(args.source.shape[0], stream_block, [&](std::int64_t begin, std::int64_t end) {
    read_block(args.source.as<float>() + begin, end - begin, args.sums.as<float>() + begin / stream_block);
  });
}

void stream_copy(const StreamCopy& args) noexcept {
  parallel_for(args.source.shape[0], stream_block, [&](std::int64_t begin, std::int64_t end) {
    const float* source = args.source.as<float>() + begin;
    float* target = args.target.as<float>() + begin;
    for_columns(end - begin, [&](std::int64_t c, auto get, auto put)
                                 __attribute__((always_inline)) { put(target + c, get(source + c)); });
  });
}

void multiply_add(const MultiplyAdd& args) noexcept {
  parallel_for(args.sums.shape[0], 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block)
      args.sums.as<float>()[block] = run_chains(args.rounds);
  });
}

}  // namespace HRMCORE_ISA
}  // namespace hrmcore
