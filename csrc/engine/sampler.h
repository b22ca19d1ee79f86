// The next token of one request from its row of logits.
//
// The scores of tokens seen before (prompt and answer) are divided by the repetition penalty where positive
// and multiplied where negative (arXiv 1909.05858, section 4.1). Temperature 0 takes the largest, the lowest
// id among equals. Otherwise s = (score - largest) / temperature, and these go, in this order: what is below
// the k-th largest (what equals it stays); what lies beyond the fewest most probable tokens whose mass
// reaches top_p (lower ids first among equals; arXiv 1904.09751); what is less than min_p times as probable
// as the largest (arXiv 2407.01082). The token drawn is the first whose cumulative weight exp(s), by
// ascending id, exceeds u times the whole. All in float64.
//
// u of a request's n-th draw, n from 1, is the upper 53 bits of the first word of Philox4x64-10 (core/philox.h) of
// counter n under the seed as key: it depends on nothing but seed and n.
#pragma once

#include <cstdint>
#include <unordered_set>
#include <vector>

namespace hrmcore {

struct SamplingOptions {
  double temperature = 0;
  std::int64_t top_k = 0;  // 0 is none
  double top_p = 1, min_p = 0, repetition_penalty = 1;
  std::uint64_t seed = 0;

  // Throws std::invalid_argument naming the option that is out of range.
  void check() const;
};

// Room for one row of V scores, shared by the samplers that take turns in it.
struct SamplingRoom {
  explicit SamplingRoom(std::int64_t vocabulary);
  std::vector<double> scores, sorted;
  std::vector<std::int64_t> ids;
};

struct TokenScore {
  std::int64_t token;
  double logprob;
};

// Natural logarithms of softmax(logits[V]) in float64: of `token`, then of the `top` largest, in descending
// order, the lower id first among equals; all tokens when there are fewer. Reads the row three times.
std::vector<TokenScore> log_probabilities(const float* logits, std::int64_t vocabulary, std::int64_t token,
                                          std::int64_t top);

class Sampler {
 public:
  // Throws std::invalid_argument on options out of range.
  Sampler(const SamplingOptions& options, const std::vector<std::int64_t>& prompt);

  // The token that follows logits[V], without counting it; not_finite - token when that token's logit, the
  // first that decides, is NaN or infinite. Reads the row twice when greedy, else a few times in float64.
  std::int64_t pick(const float* logits, std::int64_t vocabulary, SamplingRoom& room) const noexcept;
  static constexpr std::int64_t not_finite = -1;

  // Counts the token that pick gave.
  void accept(std::int64_t token);

  bool greedy() const { return options_.temperature == 0 && options_.repetition_penalty == 1; }
  std::uint64_t draws() const { return draws_; }                          // tokens accepted
  const std::unordered_set<std::int64_t>& seen() const { return seen_; }  // empty without a penalty

 private:
  std::int64_t draw(std::int64_t best, std::int64_t vocabulary, SamplingRoom& room) const noexcept;

  SamplingOptions options_;
  std::uint64_t draws_ = 0;
  std::unordered_set<std::int64_t> seen_;  // kept only with a penalty
};

}  // namespace hrmcore
