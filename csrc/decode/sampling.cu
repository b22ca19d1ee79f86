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
              above_at = ties_at + 4 * warps, uniform_at = above_at + 8, digit_at = uniform_at + 8,
              shared_bytes = digit_at + 8;

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
template <int n>
struct Row {
  const float* logits;
  const std::int32_t* seen;  // null without a penalty
  Penalty penalty;
  int begin, end;  // of this warp

  __device__ __forceinline__ Row(const float* logits_, const std::int32_t* seen_, const Penalty& penalty_,
                                 int vocabulary)
      : logits(logits_), seen(seen_), penalty(penalty_) {
    constexpr int turn = 32 * n;
    const int of_warp = (vocabulary + warps * turn - 1) / (warps * turn) * turn;
    begin = min(static_cast<int>(threadIdx.x / 32) * of_warp, vocabulary);
    end = min(begin + of_warp, vocabulary);
  }

  __device__ __forceinline__ Floats<n> scores(int first) const {
    Floats<n> x = load<n>(logits + first);
    if (seen == nullptr) return x;
    const auto bits = static_cast<std::uint32_t>(load_one(seen + first / 32)) >> (first % 32);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if ((bits >> i & 1) != 0) x[i] = penalised(x[i], penalty);
    }
    return x;
  }

  // f(id, score) of this lane's tokens; several accesses are under way at once.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    constexpr int turn = 32 * n, ahead = 4;
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

__device__ __forceinline__ Mass add(Mass a, Mass b) { return a + b; }

// The weight of scores, and what the filters have left of them so far.
struct Weights {
  float top, scale;
  float min_p = 0;
  std::uint32_t least = 0;  // the key below which all is gone
  Mass ties = ~Mass{0};     // how many of those at `least` stay, the lowest ids

  __device__ __forceinline__ Mass before_min_p(float score) const { return mass(score, 0.0f); }
  __device__ __forceinline__ Mass operator()(float score) const { return mass(score, min_p); }

 private:
  __device__ __forceinline__ Mass mass(float score, float smallest) const {
    if (score < -largest_float) return 0;
    const float weight = expf(fmaxf(score - top, -largest_float) * scale);
    return weight < smallest ? 0 : static_cast<Mass>(weight * unit);
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

// The bin where the sum of the bins from the top reaches the target, `above` being there before.
__device__ __forceinline__ Cut find_bin(Mass target, Mass above) {
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
  Mass before = above + up_to_lane - sum;
  for (int w = 0; w < warp; ++w) before += scan[w];
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

// amount(key, score) of all scores must come to the target at least.
template <int n, class F>
__device__ __forceinline__ Cut select(const Row<n>& row, Mass target, const F& amount) {
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
    const Cut found = find_bin(target, cut.above);
    cut = {cut.key << bits | found.key, found.above};
    if (shift == 0) return cut;
    if (shift == 10) bits = 10;
  }
}

// The token that the random number falls on, by one warp.
template <int n>
__device__ __forceinline__ int draw_in_warp(const Row<n>& row, const Weights& weights, Mass ties_left,
                                            Mass rest) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const Mass of_tie = weights(score_of(weights.least));
  for (int first = row.begin; first < row.end; first += 32 * n) {
    const int mine = first + lane * n;
    Mass own[n], ties = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) own[i] = 0;
    unsigned tied = 0;
    if (mine < row.end) {
      const Floats<n> scores = row.scores(mine);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const std::uint32_t key = key_of(scores[i]);
        if (key > weights.least) own[i] = weights(scores[i]);
        if (key == weights.least) tied |= 1u << i;
        ties += key == weights.least ? 1 : 0;
      }
    }
    const Mass ties_up_to_lane = sum_up_to_lane(ties);
    Mass before = ties_up_to_lane - ties;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if ((tied >> i & 1) != 0 && before++ < ties_left) own[i] = of_tie;
      sum += own[i];
    }
    const Mass up_to_lane = sum_up_to_lane(sum);
    const unsigned passed = __ballot_sync(0xffffffffu, up_to_lane > rest);
    if (passed != 0) {
      if ((passed & (1u << lane)) == 0 || (passed & ((1u << lane) - 1)) != 0) return -1;  // another lane's
      Mass cumulative = up_to_lane - sum;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        cumulative += own[i];
        if (cumulative > rest) return mine + i;
      }
    }
    rest -= __shfl_sync(0xffffffffu, up_to_lane, 31);
    const Mass all_ties = __shfl_sync(0xffffffffu, ties_up_to_lane, 31);
    ties_left -= all_ties < ties_left ? all_ties : ties_left;
  }
  return -1;
}

// Writes the token of a row whose filters are known.
template <int n>
__device__ __forceinline__ void draw_from(const Row<n>& row, const Weights& weights, double uniform,
                                          std::int32_t* drawn) {
  const SharedArray<Mass> of_warps = shared_array<Mass>(of_warps_at);
  const SharedArray<std::uint32_t> ties_of_warps = shared_array<std::uint32_t>(ties_at);
  const int warp = static_cast<int>(threadIdx.x / 32);
  Mass sum = 0;
  std::uint32_t ties = 0;
  row.for_each([&](int, float score) {
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
  Mass whole = 0, left = weights.ties, mine = 0, before = 0, left_of_mine = 0;
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
  const auto scaled = static_cast<Mass>(uniform * static_cast<double>(whole));
  const Mass target = scaled < whole ? scaled : whole - 1;
  if (target < before || target - before >= mine) return;
  const int token = draw_in_warp(row, weights, left_of_mine, target - before);
  if (token >= 0) store_packed<1>(drawn, Packed<std::int32_t, 1>{{token}});
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
template <int n>
__device__ __forceinline__ void keep_top_p(const Row<n>& row, double p, Weights& weights) {
  const auto mass = [&](std::uint32_t key, float score) {
    return key >= weights.least ? weights.before_min_p(score) : 0;
  };
  Mass whole = 0;
  row.for_each([&](int, float score) { whole += mass(key_of(score), score); });
  whole = over_block(whole, add);
  const Mass wanted = static_cast<Mass>(ceil(p * static_cast<double>(whole)));
  const Mass target = wanted < 1 ? 1 : wanted < whole ? wanted : whole;
  const Cut cut = select(row, target, mass);
  const Mass of_tie = weights.before_min_p(score_of(cut.key));
  weights.least = cut.key;
  weights.ties = (target - cut.above + of_tie - 1) / of_tie;
}

template <int n>
__global__ void __launch_bounds__(threads, 1) draw(TokenDraw args) {
  const int request = static_cast<int>(blockIdx.x), vocabulary = static_cast<int>(args.logits.shape[1]);
  const int slots = static_cast<int>(args.options.shape[0]);
  const std::int64_t slot = min(max(load_one(args.slots.as<std::int32_t>() + request), 0), slots - 1);
  const double* const options = args.options.as<double>() + slot * sampling_options;
  const double temperature = load_one(options), top_p = load_one(options + 1),
               penalty = load_one(options + 3);
  const std::int64_t top_k = load_one(args.counts.as<std::int64_t>() + slot * sampling_counts);
  std::int32_t* const drawn = args.drawn.as<std::int32_t>() + request;
  const bool penalises = penalty != 1;
  if (threadIdx.x == 0) begin_draw(args, request, slot, penalises);
  __syncthreads();
  const Row<n> row(args.logits.as<float>() + static_cast<std::int64_t>(request) * vocabulary,
                   penalises ? args.seen.as<std::int32_t>() + slot * args.seen.shape[1] : nullptr,
                   {penalty, 1 / penalty}, vocabulary);
  Mass best = 0;  // the key, then the lowest id
  row.for_each([&](int id, float score) {
    const Mass candidate = static_cast<Mass>(key_of(score)) << 32 | (0xffffffffu - static_cast<unsigned>(id));
    best = best < candidate ? candidate : best;
  });
  best = over_block(best, [](Mass a, Mass b) { return a < b ? b : a; });
  const int largest = static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
  Weights weights{score_of(static_cast<std::uint32_t>(best >> 32)), 0.0f};
  const bool usable = finite(weights.top);
  if (!usable || temperature == 0) {
    if (threadIdx.x == 0) store_packed<1>(drawn, Packed<std::int32_t, 1>{{usable ? largest : -1 - largest}});
    return;
  }
  weights.scale = static_cast<float>(1 / (temperature < 1e-30 ? 1e-30 : temperature));
  weights.min_p = static_cast<float>(load_one(options + 2));
  if (top_k > 0 && top_k < vocabulary) {
    const auto one = [](std::uint32_t, float) { return Mass{1}; };
    weights.least = select(row, static_cast<Mass>(top_k), one).key;
  }
  if (top_p < 1) keep_top_p(row, top_p, weights);
  draw_from(row, weights, shared_array<double>(uniform_at)[0], drawn);
}

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_KERNEL(cuda_draw, hrmcore::TokenDraw) {
  using namespace hrmcore::cuda;
  const LaunchShape shape{dim3(static_cast<unsigned>(args.logits.shape[0])), threads, shared_bytes};
  return rows_are_wide({&args.logits}) ? launch(draw<4>, shape, args, stream)
                                       : launch(draw<1>, shape, args, stream);
}
