#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "core/philox.h"
#include "core/tensor.h"

namespace hrmcore {
namespace {

constexpr double gone = -std::numeric_limits<double>::infinity();

// The token that decides: the first NaN if there is one, else the first of the largest.
template <class Real>
std::int64_t first_largest(const Real* scores, std::int64_t count) {
  std::int64_t best = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (std::isnan(scores[i])) return i;
    if (scores[i] > scores[best]) best = i;
  }
  return best;
}

void keep_top_k(std::int64_t k, SamplingRoom& room) {
  const auto count = static_cast<std::int64_t>(room.scores.size());
  if (k >= count) return;
  room.sorted = room.scores;  // of the same size: no allocation
  std::nth_element(room.sorted.begin(), room.sorted.begin() + (k - 1), room.sorted.end(), std::greater<>());
  const double least = room.sorted[static_cast<std::size_t>(k - 1)];
  for (double& score : room.scores) score = score < least ? gone : score;
}

void keep_top_p(double p, SamplingRoom& room) {
  if (p == 1) return;
  double mass = 0;
  std::size_t left = 0;
  for (std::size_t id = 0; id < room.scores.size(); ++id) {
    if (const double weight = std::exp(room.scores[id]); weight > 0) {
      mass += weight;
      room.ids[left++] = static_cast<std::int64_t>(id);
    } else {
      room.scores[id] = gone;
    }
  }
  // A heap, because usually few tokens hold the mass: V + kept log V steps.
  const auto later = [&room](std::int64_t a, std::int64_t b) {
    const double x = room.scores[static_cast<std::size_t>(a)], y = room.scores[static_cast<std::size_t>(b)];
    return x < y || (x == y && a > b);
  };
  const auto begin = room.ids.begin();
  auto end = begin + static_cast<std::ptrdiff_t>(left);
  std::make_heap(begin, end, later);
  for (double before = 0; end != begin && before < p * mass; --end) {
    std::pop_heap(begin, end, later);
    before += std::exp(room.scores[static_cast<std::size_t>(*(end - 1))]);
  }
  for (auto id = begin; id != end; ++id) room.scores[static_cast<std::size_t>(*id)] = gone;
}

}  // namespace

std::vector<TokenScore> log_probabilities(const float* logits, std::int64_t vocabulary, std::int64_t token,
                                          std::int64_t top) {
  const double largest = *std::max_element(logits, logits + vocabulary);
  double mass = 0;
  for (std::int64_t id = 0; id < vocabulary; ++id)
    mass += std::exp(static_cast<double>(logits[id]) - largest);
  const double whole = largest + std::log(mass);
  const auto before = [logits](std::int64_t a, std::int64_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  };
  std::vector<std::int64_t> ids(static_cast<std::size_t>(std::min(top, vocabulary)));
  std::iota(ids.begin(), ids.end(), 0);
  std::sort(ids.begin(), ids.end(), before);
  for (auto id = static_cast<std::int64_t>(ids.size()); !ids.empty() && id < vocabulary; ++id) {
    if (!before(id, ids.back())) continue;
    ids.insert(std::upper_bound(ids.begin(), ids.end(), id, before), id);
    ids.pop_back();
  }
  std::vector<TokenScore> scores{{token, static_cast<double>(logits[token]) - whole}};
  for (const std::int64_t id : ids) scores.push_back({id, static_cast<double>(logits[id]) - whole});
  return scores;
}

void SamplingOptions::check() const {
  const auto demand = [](bool ok, const char* name, const char* expected, double came) {
    if (!ok) reject("Sampler", name, expected, std::to_string(came));
  };
  demand(std::isfinite(temperature) && temperature >= 0, "temperature", "0 or more", temperature);
  demand(top_k >= 0, "top_k", "at least 1, or 0 for none", static_cast<double>(top_k));
  demand(top_p > 0 && top_p <= 1, "top_p", "above 0 and at most 1", top_p);
  demand(min_p >= 0 && min_p <= 1, "min_p", "between 0 and 1", min_p);
  demand(std::isfinite(repetition_penalty) && repetition_penalty > 0, "repetition_penalty", "above 0",
         repetition_penalty);
}

SamplingRoom::SamplingRoom(std::int64_t vocabulary)
    : scores(static_cast<std::size_t>(vocabulary)),
      sorted(static_cast<std::size_t>(vocabulary)),
      ids(static_cast<std::size_t>(vocabulary)) {}

Sampler::Sampler(const SamplingOptions& options, const std::vector<std::int64_t>& prompt)
    : options_(options) {
  options.check();
  if (options.repetition_penalty != 1) seen_.insert(prompt.begin(), prompt.end());
}

std::int64_t Sampler::pick(const float* logits, std::int64_t vocabulary, SamplingRoom& room) const noexcept {
  if (greedy()) {
    const std::int64_t best = first_largest(logits, vocabulary);
    return std::isfinite(logits[best]) ? best : not_finite - best;
  }
  std::copy(logits, logits + vocabulary, room.scores.begin());
  for (const std::int64_t id : seen_) {
    if (id < 0 || id >= vocabulary) continue;
    double& score = room.scores[static_cast<std::size_t>(id)];
    score = score < 0 ? score * options_.repetition_penalty : score / options_.repetition_penalty;
  }
  const std::int64_t best = first_largest(room.scores.data(), vocabulary);
  if (!std::isfinite(room.scores[static_cast<std::size_t>(best)])) return not_finite - best;
  return options_.temperature == 0 ? best : draw(best, vocabulary, room);
}

std::int64_t Sampler::draw(std::int64_t best, std::int64_t vocabulary, SamplingRoom& room) const noexcept {
  const double largest = room.scores[static_cast<std::size_t>(best)];
  for (double& score : room.scores) score = (score - largest) / options_.temperature;
  if (options_.top_k > 0) keep_top_k(options_.top_k, room);
  keep_top_p(options_.top_p, room);
  double whole = 0;
  for (double& score : room.scores) {
    const double weight = std::exp(score);
    score = weight < options_.min_p ? 0 : weight;
    whole += score;
  }
  const double target = uniform_of_draw(options_.seed, draws_) * whole;
  double cumulative = 0;
  std::int64_t last = best;
  for (std::int64_t id = 0; id < vocabulary; ++id) {
    const double weight = room.scores[static_cast<std::size_t>(id)];
    if (weight == 0) continue;
    cumulative += weight;
    last = id;
    if (cumulative > target) break;
  }
  return last;
}

void Sampler::accept(std::int64_t token) {
  if (options_.repetition_penalty != 1) seen_.insert(token);
  ++draws_;
}

}  // namespace hrmcore
