#include "decode/sampling.h"

#include "core/cuda.cuh"
#include "core/philox.h"

// A block a request. Each warp owns a run of neighbouring tokens, so that sums by ascending id are sums over warps, over
// turns of a warp, over lanes, over a lane's own.

namespace hrmcore::cuda {
namespace {

constexpr int threads = 512;
constexpr int warps = threads / 32;
constexpr int bins = 2048;  // of a digit
constexpr int bins_of_thread = bins / threads;
constexpr float unit = 0x1p40f;  // whole numbers in a weight of 1
constexpr float largest_float = 3.4028234663852886e38f;

using Mass = unsigned long long;  // of weights, or a count

// Where things lie in shared memory, in bytes.
constexpr int low_at = 0, high_at = low_at + 4 * bins, of_warps_at = high_at + 4 * bins,
              scan_at = of_warps_at + 8 * warps, ties_at = scan_at + 8 * warps,
              above_at = ties_at + 4 * warps, uniform_at = above_at + 16, digit_at = uniform_at + 8,
              bounds_at = digit_at + 8, shared_bytes = bounds_at + 8;

// An unsigned number in the order of the floats; the two zeros are equal, a NaN is above all.
__device__ __forceinline__ std::uint32_t key_of(float score) {
  const std::uint32_t bits = __float_as_uint(score + 0.0f);
  if (score != score) return 0xffffffffu;
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float score_of(std::uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= largest_float; }

struct Penalty {
  double factor, inverse;
};
__device__ __forceinline__ float penalised(float logit, const Penalty& penalty) {
  const double wide = static_cast<double>(logit);
  const float score = static_cast<float>(wide * (wide < 0 ? penalty.factor : penalty.inverse));
  return finite(logit) ? fminf(fmaxf(score, -largest_float), largest_float) : score;
}

// The sum over this lane and those below it.
template <class T>
__device__ __forceinline__ T sum_up_to_lane(T x) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const T before = __shfl_sync(0xffffffffu, x, max(lane - by, 0));
    if (lane >= by) x += before;
  }
  return x;
}

// One row as the filters see it; n logits an access.
template <int n_, bool penalises>
struct Row {
  static constexpr int n = n_, turn = 32 * n;  // tokens of a warp at once
  const float* logits;
  const std::int32_t* seen;
  Penalty penalty;
  int begin, end;  // of this warp

  // The same of neighbouring tokens only, shared out among the warps.
  __device__ __forceinline__ Row within(int first, int last) const {
    const int of_warp = (last - first + warps * turn - 1) / (warps * turn) * turn;
    Row part = *this;
    part.begin = min(first + static_cast<int>(threadIdx.x / 32) * of_warp, last);
    part.end = min(part.begin + of_warp, last);
    return part;
  }

  __device__ __forceinline__ Floats<n> scores(int first) const {
    Floats<n> x = load<n>(logits + first);
    if constexpr (penalises) {
      const auto bits = static_cast<std::uint32_t>(load_one(seen + first / 32)) >> (first % 32);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if ((bits >> i & 1) != 0) x[i] = penalised(x[i], penalty);
      }
    }
    return x;
  }

  // f(id, score) of this lane's tokens, ascending; several accesses are under way at once.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    constexpr int ahead = 4;
    for (int first = begin + static_cast<int>(threadIdx.x % 32) * n; first < end; first += ahead * turn) {
      Floats<n> x[ahead] = {};
#pragma unroll
      for (int a = 0; a < ahead; ++a) {
        if (first + a * turn < end) x[a] = scores(first + a * turn);
      }
#pragma unroll
      for (int a = 0; a < ahead; ++a) {
        if (first + a * turn >= end) break;
#pragma unroll
        for (int i = 0; i < n; ++i) f(first + a * turn + i, x[a][i]);
      }
    }
  }
};

// Of every thread's number, in every thread.
template <class F>
__device__ __forceinline__ Mass over_block(Mass x, const F& combine) {
  const SharedArray<Mass> of_warps = shared_array<Mass>(of_warps_at);
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, by));
  if (threadIdx.x % 32 == 0) of_warps[static_cast<int>(threadIdx.x / 32)] = x;
  __syncthreads();
  Mass all = of_warps[0];
  for (int warp = 1; warp < warps; ++warp) all = combine(all, static_cast<Mass>(of_warps[warp]));
  __syncthreads();
  return all;
}

// The weight of scores, and what the filters have left of them so far.
struct Weights {
  float top, scale;  // scale: log2(e) / temperature
  float min_p = 0;
  std::uint32_t least = 0;  // the key below which all is gone
  Mass ties = ~Mass{0};     // how many of those at `least` stay, the lowest ids

  __device__ __forceinline__ Mass before_min_p(float score) const { return mass(score, 0.0f); }
  __device__ __forceinline__ Mass operator()(float score) const { return mass(score, min_p); }

 private:
  __device__ __forceinline__ Mass mass(float score, float smallest) const {
    float weight = quick_exp2(fmaxf(score - top, -largest_float) * scale);
    weight = score < -largest_float || weight < smallest ? 0.0f : weight;
    return static_cast<Mass>(weight * unit);
  }
};

struct Cut {
  std::uint32_t key;  // by descending scores, the first where the sum reaches the target
  Mass above;         // the sum of those before
};

// A sum of 64 bits in two of 32: shared memory adds no more at once.
__device__ __forceinline__ void add_to_bin(int bin, Mass amount) {
  std::uint32_t* const low = shared_array<std::uint32_t>(low_at).data + bin;
  const auto part = static_cast<std::uint32_t>(amount);
  const bool carry = atomicAdd(low, part) + part < part;
  const std::uint32_t rest = static_cast<std::uint32_t>(amount >> 32) + (carry ? 1u : 0u);
  if (rest != 0) atomicAdd(shared_array<std::uint32_t>(high_at).data + bin, rest);
}

// The bin where the sum of the bins from the top reaches the target, `above` being there before. Of the first digit the
// target is wanted(the sum of all).
template <class F>
__device__ __forceinline__ Cut find_bin(bool first_digit, Mass& target, Mass above, const F& wanted) {
  const SharedArray<std::uint32_t> low = shared_array<std::uint32_t>(low_at),
                                   high = shared_array<std::uint32_t>(high_at),
                                   digit = shared_array<std::uint32_t>(digit_at);
  const SharedArray<Mass> scan = shared_array<Mass>(scan_at), found_above = shared_array<Mass>(above_at);
  const int warp = static_cast<int>(threadIdx.x / 32),
            top = bins - 1 - bins_of_thread * static_cast<int>(threadIdx.x);
  Mass own[bins_of_thread], sum = 0;
#pragma unroll
  for (int i = 0; i < bins_of_thread; ++i) {
    own[i] = static_cast<Mass>(high[top - i]) << 32 | low[top - i];
    sum += own[i];
  }
  const Mass up_to_lane = sum_up_to_lane(sum);
  if (threadIdx.x % 32 == 31) scan[warp] = up_to_lane;
  __syncthreads();
  Mass before = above + up_to_lane - sum, all = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before += all;
    all += scan[w];
  }
  if (first_digit) target = wanted(all);
#pragma unroll
  for (int i = 0; i < bins_of_thread; ++i) {
    if (before < target && before + own[i] >= target) {
      digit[0] = static_cast<std::uint32_t>(top - i);
      found_above[0] = before;
    }
    before += own[i];
  }
  __syncthreads();
  return {digit[0], found_above[0]};
}

// By descending scores, where amount(key, score) comes to wanted(the amount of all), which is no more than that.
template <class R, class F, class G>
__device__ __forceinline__ Cut select(const R& row, const F& amount, const G& wanted, Mass& target) {
  const SharedArray<std::uint32_t> low = shared_array<std::uint32_t>(low_at),
                                   high = shared_array<std::uint32_t>(high_at);
  Cut cut{0, 0};
#pragma unroll 1
  for (int shift = 21, bits = 11;; shift = max(shift - 11, 0)) {
    for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += threads) low[bin] = high[bin] = 0u;
    __syncthreads();
    row.for_each([&](int, float score) {
      const std::uint32_t key = key_of(score), digit = key >> shift;
      if (shift != 21 && digit >> bits != cut.key) return;
      if (const Mass more = amount(key, score))
        add_to_bin(static_cast<int>(digit & ((1u << bits) - 1)), more);
    });
    __syncthreads();
    const Cut found = find_bin(shift == 21, target, cut.above, wanted);
    cut = {cut.key << bits | found.key, found.above};
    if (shift == 0) return cut;
    if (shift == 10) bits = 10;
  }
}

// Where the random number falls, among neighbouring tokens: it is `rest` above the weight of those before, and of the
// ties `ties` stay from here on.
struct Place {
  int begin, end;
  Mass rest, ties;
};

// The part of a place that is one warp's share of it. At first the random number is of the whole.
template <class R>
__device__ __forceinline__ Place narrower(const R& row, const Weights& weights, const Place& place,
                                          bool first, double uniform) {
  const SharedArray<Mass> of_warps = shared_array<Mass>(of_warps_at), found = shared_array<Mass>(above_at);
  const SharedArray<std::uint32_t> ties_of_warps = shared_array<std::uint32_t>(ties_at);
  const SharedArray<int> bounds = shared_array<int>(bounds_at);
  const R part = row.within(place.begin, place.end);
  const int warp = static_cast<int>(threadIdx.x / 32);
  Mass sum = 0;
  std::uint32_t ties = 0;
  part.for_each([&](int, float score) {
    const std::uint32_t key = key_of(score);
    if (key > weights.least) sum += weights(score);
    ties += key == weights.least ? 1 : 0;
  });
  sum = warp_sum(sum);
  ties = warp_sum(ties);
  if (threadIdx.x % 32 == 0) {
    of_warps[warp] = sum;
    ties_of_warps[warp] = ties;
  }
  __syncthreads();
  const Mass of_tie = weights(score_of(weights.least));
  Mass whole = 0, left = place.ties, mine = 0, before = 0, left_of_mine = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) {
      before = whole;
      left_of_mine = left;
    }
    const Mass tied = ties_of_warps[w], kept = tied < left ? tied : left;
    whole += of_warps[w] + kept * of_tie;
    left -= kept;
    if (w == warp) mine = whole - before;
  }
  Mass rest = place.rest;
  if (first) {
    rest = static_cast<Mass>(uniform * static_cast<double>(whole));
    rest = rest < whole ? rest : whole - 1;
  }
  if (threadIdx.x % 32 == 0 && rest >= before && rest - before < mine) {
    bounds[0] = part.begin;
    bounds[1] = part.end;
    found[0] = rest - before;
    found[1] = left_of_mine;
  }
  __syncthreads();
  return {bounds[0], bounds[1], found[0], found[1]};
}

// The token that the random number falls on, of those that a warp takes at once; -1 in the lanes that do not have it.
template <class R>
__device__ __forceinline__ int token_of(const R& row, const Weights& weights, const Place& place) {
  constexpr int n = R::n;
  const int lane = static_cast<int>(threadIdx.x % 32), mine = place.begin + lane * n;
  Mass own[n] = {}, ties = 0, sum = 0;
  unsigned tied = 0;
  if (mine < place.end) {
    const Floats<n> scores = row.scores(mine);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const std::uint32_t key = key_of(scores[i]);
      if (key >= weights.least) own[i] = weights(scores[i]);
      if (key == weights.least) tied |= 1u << i;
      ties += key == weights.least ? 1 : 0;
    }
  }
  Mass before = sum_up_to_lane(ties) - ties;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if ((tied >> i & 1) != 0 && before++ >= place.ties) own[i] = 0;
    sum += own[i];
  }
  Mass cumulative = sum_up_to_lane(sum);
  if (cumulative <= place.rest || cumulative - sum > place.rest) return -1;
  cumulative -= sum;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    cumulative += own[i];
    if (cumulative > place.rest) return mine + i;
  }
  return -1;
}

// Counts the token that was fed and this draw; the draw's random number is left in shared memory.
__device__ __forceinline__ void begin_draw(const TokenDraw& args, int request, std::int64_t slot,
                                           bool counts_seen) {
  const int token = load_one(args.fed.as<std::int32_t>() + request);
  if (counts_seen && token >= 0 && token < args.logits.shape[1]) {
    std::int32_t* const word = args.seen.as<std::int32_t>() + slot * args.seen.shape[1] + token / 32;
    const auto bits = static_cast<std::uint32_t>(load_one(word)) | 1u << (token % 32);
    store_packed<1>(word, Packed<std::int32_t, 1>{{static_cast<std::int32_t>(bits)}});
  }
  std::int32_t* const position = args.positions.as<std::int32_t>() + request;
  store_packed<1>(position, Packed<std::int32_t, 1>{{load_one(position) + 1}});
  std::int64_t* const counts = args.counts.as<std::int64_t>() + slot * sampling_counts;
  const std::int64_t draws = load_one(counts + 2);
  shared_array<double>(uniform_at)[0] =
      uniform_of_draw(static_cast<std::uint64_t>(load_one(counts + 1)), static_cast<std::uint64_t>(draws));
  store_packed<1>(counts + 2, Packed<std::int64_t, 1>{{draws + 1}});
}

// What top_p leaves of what the weights leave already.
template <class R>
__device__ __forceinline__ void keep_top_p(const R& row, double p, Weights& weights) {
  const std::uint32_t least = weights.least;
  const auto mass = [&](std::uint32_t key, float score) {
    return key >= least ? weights.before_min_p(score) : Mass{0};
  };
  const auto wanted = [p](Mass whole) {
    const Mass part = static_cast<Mass>(ceil(p * static_cast<double>(whole)));
    return part < 1 ? Mass{1} : part < whole ? part : whole;
  };
  Mass target = 0;
  const Cut cut = select(row, mass, wanted, target);
  const Mass of_tie = weights.before_min_p(score_of(cut.key));
  weights.least = cut.key;
  weights.ties = (target - cut.above + of_tie - 1) / of_tie;
}

struct Filters {
  double temperature, top_p, min_p;
  std::int64_t top_k;
};

// The token, in one thread, or -1 - the token that decides where its score is not finite; -1 << 31 in all others.
constexpr int none = -2147483647 - 1;
template <class R>
__device__ __forceinline__ int token_in(const R& whole, int vocabulary, const Filters& filters,
                                        double uniform) {
  const R row = whole.within(0, vocabulary);
  std::uint32_t best_key = 0;
  int best_id = 0;
  row.for_each([&](int id, float score) {
    const std::uint32_t key = key_of(score);
    if (key > best_key) {
      best_key = key;
      best_id = id;
    }
  });
  const Mass best =
      over_block(static_cast<Mass>(best_key) << 32 | (0xffffffffu - static_cast<unsigned>(best_id)),
                 [](Mass a, Mass b) { return a < b ? b : a; });  // the key, then the lowest id
  const int largest = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
  Weights weights{score_of(static_cast<std::uint32_t>(best >> 32)), 0.0f};
  const bool usable = finite(weights.top);
  if (!usable || filters.temperature == 0) return threadIdx.x != 0 ? none : usable ? largest : -1 - largest;
  weights.scale =
      static_cast<float>(1.4426950408889634 / (filters.temperature < 1e-30 ? 1e-30 : filters.temperature));
  weights.min_p = static_cast<float>(filters.min_p);
  if (filters.top_k > 0 && filters.top_k < vocabulary) {
    Mass target = static_cast<Mass>(filters.top_k);
    weights.least =
        select(
            row, [](std::uint32_t, float) { return Mass{1}; }, [target](Mass) { return target; }, target)
            .key;
  }
  if (filters.top_p < 1) keep_top_p(row, filters.top_p, weights);
  Place place = narrower(whole, weights, {0, vocabulary, 0, weights.ties}, true, uniform);
  while (place.end - place.begin > R::turn) place = narrower(whole, weights, place, false, 0);
  if (threadIdx.x >= 32) return none;
  const int token = token_of(whole, weights, place);
  return token < 0 ? none : token;
}

template <int n>
__global__ void __launch_bounds__(threads, 1) draw(TokenDraw args) {
  const int request = static_cast<int>(blockIdx.x), vocabulary = static_cast<int>(args.logits.shape[1]);
  const int slots = static_cast<int>(args.options.shape[0]);
  const std::int64_t slot = min(max(load_one(args.slots.as<std::int32_t>() + request), 0), slots - 1);
  const double* const options = args.options.as<double>() + slot * sampling_options;
  const double penalty = load_one(options + 3);
  const Filters filters{load_one(options), load_one(options + 1), load_one(options + 2),
                        load_one(args.counts.as<std::int64_t>() + slot * sampling_counts)};
  const bool penalises = penalty != 1;
  if (threadIdx.x == 0) begin_draw(args, request, slot, penalises);
  __syncthreads();
  const float* const logits = args.logits.as<float>() + static_cast<std::int64_t>(request) * vocabulary;
  const std::int32_t* const seen = args.seen.as<std::int32_t>() + slot * args.seen.shape[1];
  const double uniform = shared_array<double>(uniform_at)[0];
  const int token =
      penalises
          ? token_in(Row<n, true>{logits, seen, {penalty, 1 / penalty}, 0, 0}, vocabulary, filters, uniform)
          : token_in(Row<n, false>{logits, nullptr, {1, 1}, 0, 0}, vocabulary, filters, uniform);
  if (token != none)
    store_packed<1>(args.drawn.as<std::int32_t>() + request, Packed<std::int32_t, 1>{{token}});
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_draw, hrmcore::TokenDraw) {
  using namespace hrmcore::cuda;
  const LaunchShape shape{dim3(static_cast<unsigned>(args.logits.shape[0])), threads, shared_bytes};
  return rows_are_wide({&args.logits}) ? launch(draw<4>, shape, args, stream)
                                       : launch(draw<1>, shape, args, stream);
}
