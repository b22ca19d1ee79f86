// The next token of each request, drawn on the device from the logits of the decode step: what engine/sampler.h does on
// the CPU, in float32 and whole numbers.
//
//   formula   scores, filters and random numbers are those of engine/sampler.h. Scores are float32. The weight of a
//             score s is exp((s - largest) / temperature) in float32, as a whole number of 2^-40: sums are exact, and
//             the same bits in whatever order. A request's n-th draw falls on the CPU's token unless the mass of the
//             tokens up to one of the two, or a filter's bound, is that near: a weight's relative error is at most
//             2^-17 (40 of a power of two, three roundings each), with a penalty 2^-24 |score| / temperature more.
//   limits    a temperature from 0 to 1e-30 counts as 1e-30, weights below 2^-40 of the largest as 0, a score that
//             the repetition penalty takes beyond float32's range as the largest number in it.
//   seen      a bit a token of the vocabulary and slot. The token that a request was fed is counted before its next
//             one is drawn, so that nothing is to be taken back where a draw is thrown away.
//   reads     a block of 512 threads a request. The row of V logits (262 KB at V = 65,536, in the second-level cache)
//             once for the largest, which is all where temperature is 0; once more for the weights, then a 16th of it
//             and a 16th of that for the token; three times for top_k and three for top_p. With a penalty V bits
//             beside each. Writes 16 bytes.
//   select    the k-th largest, and the last of the nucleus, by digits of 11, 11 and 10 bits of the scores' order: a
//             histogram in shared memory each, of whole numbers.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace hrmcore {

constexpr std::int64_t sampling_options = 4;  // temperature, top_p, min_p, repetition_penalty
constexpr std::int64_t sampling_counts = 3;   // top_k (0: none), seed, draws so far
constexpr std::int64_t most_sampled_vocabulary = 1 << 22;

struct TokenDraw {
  TensorView logits;  // (B, V) float32
  TensorView fed;     // (B) int32: the token of each request that led to its logits
  TensorView slots;   // (B) int32: which of the S slots below is the request's; no two alike
  TensorView drawn;   // (B) int32, written: the token, or -1 - token where that token's logit, the first that
                      // decides, is NaN or infinite
  TensorView positions;  // (B) int32, each raised by one
  TensorView options;    // (S, 4) float64
  TensorView counts;     // (S, 3) int64, the draws raised by one
  TensorView seen;       // (S, ceil(V / 32)) int32, token t in bit t % 32 of number t / 32
};

// Throws std::invalid_argument. Values that lie on the device are not read: slots out of range are taken to be the
// nearest in range, and a fed token out of range is not counted.
void check(const TokenDraw& args);

}  // namespace hrmcore
