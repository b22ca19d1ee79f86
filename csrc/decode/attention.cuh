// Attention of one new token of each request over its cache. A request's pages of 64 keys are cut into up to 8
// splits, which follow from its length alone; a warp sees 8 rows of every page of a split.
//
// The splits of a head lie in blocks of their own where that is faster, and the phase after joins them;
// otherwise a block takes them one after the other and joins them itself. The bits are the same.
//
// Both products are the tensor cores': 8 keys of head_dim 128 take 4 reads of shared memory and 8 mma for the scores,
// and as many for the values. Query and weights go in as sums of two bfloat16, in places that would be empty.
//
// Over an int8 cache the two are sums of two f16, and 64 instructions of a warp's 8 rows of a page make f16 of bytes. A
// key's scale multiplies the sums of 32 channels, a value's the weight that meets its bytes.
#pragma once

#include "decode/activations.cuh"
#include "decode/int8_row.cuh"

namespace hrmcore::cuda {

// The pages that a token sees: with a window its own block of the window and the one before.
struct VisiblePages {
  int first, count;
};
template <class P>
__device__ __forceinline__ VisiblePages visible_pages(const P& params, int position) {
  const int low = params.window == 0 ? 0 : max(0, (position / params.window - 1) * params.window);
  return {low / page_tokens, position / page_tokens + 1 - low / page_tokens};
}

// Lists the pages that this block attends to. One warp does; a page in each lane.
template <class P>
__device__ __forceinline__ void list_pages(const P& params, const SharedLayout& layout) {
  const SharedArray<PageEntry> list = shared_array<PageEntry>(static_cast<std::size_t>(layout.pages));
  int count = 0;
  for (int number = static_cast<int>(blockIdx.x), tasks = attention_tasks(params); number < tasks;
       number += static_cast<int>(gridDim.x)) {
    const AttentionTask task = attention_task(params, number);
    if (!task.any()) continue;
    const int position = HRMCORE_REQUEST_STATE(int, position)[task.request];
    for (int split = task.first_split, begin = task.page; split < task.last_split; ++split) {
      const int end = split_begin(task.request, split + 1);
      for (int page = begin + lane_id(); page < end; page += 32) {
        const int marks = (page == task.page ? PageEntry::task_begins : 0) |
                          (page + 1 == end ? PageEntry::split_ends : 0) |
                          (page + 1 == task.end ? PageEntry::task_ends : 0) |
                          (position / page_tokens < task.end ? PageEntry::task_has_own_row : 0);
        const PageEntry entry{page_of(params, task.request, page) * page_tokens,
                              task.request,
                              task.head,
                              position - page * page_tokens,
                              split,
                              marks};
        list[count + page - begin] = entry;
      }
      count += end - begin;
      begin = end;
    }
  }
  if (lane_id() == 0) HRMCORE_REQUEST_STATE(int, page_entries)[0] = count;
}

// What a launch reads once of its requests: where the new tokens stand and go, what they see, their angles.
template <class P>
__device__ __forceinline__ void load_request_state(const P& params, const SharedLayout& layout) {
  const int request = static_cast<int>(threadIdx.x), d = params.head_dim;
  if (request < params.batch) {
    const int position = clamped(load_one(params.positions + request),
                                 min(params.table_length * page_tokens, params.rotations));
    const VisiblePages visible = visible_pages(params, position);
    HRMCORE_REQUEST_STATE(int, position)[request] = position;
    HRMCORE_REQUEST_STATE(int, first_page)[request] = visible.first;
    HRMCORE_REQUEST_STATE(int, pages)[request] = visible.count;
    HRMCORE_REQUEST_STATE(int, kv_splits)[request] = min(visible.count, max_kv_splits);
    HRMCORE_REQUEST_STATE(std::int64_t, slot_mapping)
    [request] = static_cast<std::int64_t>(page_of(params, request, position / page_tokens)) * page_tokens +
                position % page_tokens;
  }
  __syncthreads();
  const SharedArray<float> angles = shared_array<float>(static_cast<std::size_t>(layout.angles)),
                           log_decay = shared_array<float>(static_cast<std::size_t>(layout.log_decay));
  const int angles_kept = P::column_groups > 1 ? 0 : params.batch * d;
  for (int i = static_cast<int>(threadIdx.x); i < angles_kept; i += decode_threads) {
    const std::int64_t position = HRMCORE_REQUEST_STATE(int, position)[i >> params.head_shift];
    angles[i] = load_one(params.rope + position * d + (i & (d - 1)));
  }
  if (params.log_decay != nullptr && static_cast<int>(threadIdx.x) < d / 2) {
    log_decay[static_cast<int>(threadIdx.x)] = load_one(params.log_decay + threadIdx.x);
  }
  if (warp_id() == 0) list_pages(params, layout);
  __syncthreads();
}

// A number as the sum of two halves: bfloat16, or f16 beside the bytes of an int8 cache.
template <class P>
__device__ __forceinline__ float half_of_sum(bf16x2 pair, int which) {
  if constexpr (P::int8_cache) return half_of_f16(pair, which);
  return half_of(pair, which);
}
template <class P>
__device__ __forceinline__ void split_sum(float x, float y, bf16x2& first, bf16x2& second) {
  if constexpr (P::int8_cache) {
    split_pair_f16(x, y, first, second);
  } else {
    split_pair(x, y, first, second);
  }
}
template <class P>
__device__ __forceinline__ void multiply_sums(float (&c)[4], const bf16x2 (&a)[4], const bf16x2 (&b)[2]) {
  if constexpr (P::int8_cache) {
    mma_f16(c, a, b);
  } else {
    mma_bf16(c, a, b);
  }
}
// Queries beside an int8 cache are stored in sixteenths, as activations that are f16.
template <class P>
constexpr float query_unit = P::int8_cache ? 1.0f / 16 : 1.0f;

// The query of a head as the tensor cores take it: four lanes share a row, each has every fourth 8 channels. It is
// the sum of two halves, 16 bits in all: rows 0 to 7 of a product are all the first, rows 8 to 15 the second. So of two
// neighbouring channels the first halves come, then the second: in memory, too. It is in units of log 2.
struct Query {
  Packed<bf16x2, 4> pieces[4][2];
};
__device__ __forceinline__ int query_channel(int piece) { return 8 * (lane_id() % 4 + 4 * piece); }

// A piece of it with each channel decayed by the distance of this lane's key, of row lane / 4: xPos.
template <class P>
__device__ __forceinline__ void decay(const P& params, const SharedLayout& layout, int piece, int distance,
                                      Packed<bf16x2, 4> (&query)[2]) {
  const SharedArray<float> log_decay = shared_array<float>(static_cast<std::size_t>(layout.log_decay));
  if (query_channel(piece) >= params.head_dim) return;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    bf16x2 &high = query[pair / 2].at[pair % 2 * 2], &low = query[pair / 2].at[pair % 2 * 2 + 1];
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = query_channel(piece) + 2 * pair + i;
      x[i] = (half_of_sum<P>(high, i) + half_of_sum<P>(low, i)) *
             quick_exp(log_decay[channel & (params.head_dim / 2 - 1)] * static_cast<float>(distance));
    }
    split_sum<P>(x[0], x[1], high, low);
  }
}

// The softmax of a warp's keys so far. Each lane has its own two keys' weights, and of each 16 channels lane
// 4g + h has the sums of g and g + 8, in the first and third place: the others are theirs again.
struct Softmax {
  float row_max = -__builtin_inff(), row_sum = 0;
  float out[8][4] = {};
  int unit = 0x00800000;  // of an int8 cache: what `out` is counted in, the bits of a power of two
};

// Eight channels of this lane's key, of row lane / 4.
template <class P>
__device__ __forceinline__ Packed<bf16x2, 4> key_channels(const P& params, int slot, int piece) {
  const int row = lane_id() / 4, channel = query_channel(piece);
  if constexpr (P::int8_cache) {
    const int at = int8_stage(params, slot).keys(row, channel / 16) + channel % 16;
    const Packed<std::uint32_t, 2> bytes =
        shared_array<Packed<std::uint32_t, 2>>(static_cast<std::size_t>(at))[0];
    return {{from_bytes(bytes.at[0], first_two), from_bytes(bytes.at[0], last_two),
             from_bytes(bytes.at[1], first_two), from_bytes(bytes.at[1], last_two)}};
  } else {
    return shared_array<Packed<bf16x2, 4>>(
        static_cast<std::size_t>(slot + row * params.head_dim * 2))[channel / 8];
  }
}

// The scales of this lane's two keys and values; of another cache none.
using TwoScales = Int8Scales[2];
template <class P>
__device__ __forceinline__ void read_scales(const P& params, int slot, TwoScales& scales) {
  const int first = int8_stage(params, slot).scales(2 * (lane_id() % 4));
#pragma unroll
  for (int i = 0; i < 2; ++i) scales[i] = shared_array<Int8Scales>(static_cast<std::size_t>(first))[i];
}

// The scores of this lane's two keys, of which each piece has been summed up alone.
template <class P>
__device__ __forceinline__ void add_pieces(const P& params, const TwoScales& scales,
                                           const float (&sums)[4][4], float (&scores)[2]) {
  if constexpr (P::int8_cache) {
    const int groups = params.page().groups();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores[i] = key_scale(scales[i], 0) * (sums[0][i] + sums[0][i + 2]);
#pragma unroll
      for (int piece = 1; piece < 4; ++piece) {
        if (piece < groups) scores[i] += key_scale(scales[i], piece) * (sums[piece][i] + sums[piece][i + 2]);
      }
      scores[i] *= 1 / query_unit<P>;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores[i] = (sums[0][i] + sums[0][i + 2]) + (sums[1][i] + sums[1][i + 2]) +
                  ((sums[2][i] + sums[2][i + 2]) + (sums[3][i] + sums[3][i + 2]));
    }
  }
}

// This lane's two keys of the 8 in a stage, 2 (lane % 4) and the next: q k.
template <class P>
__device__ __forceinline__ void score(const P& params, const SharedLayout& layout, const Query& q, int slot,
                                      int distance, const TwoScales& scales, float (&scores)[2]) {
  const int d = params.head_dim, row = lane_id() / 4;
  const bool decays = params.log_decay != nullptr;
  float sums[4][4] = {};
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    if (32 * piece >= d) break;
    Packed<bf16x2, 4> k{}, query[2] = {q.pieces[piece][0], q.pieces[piece][1]};
    if (query_channel(piece) < d) k = key_channels(params, slot, piece);
    if (decays) decay(params, layout, piece, distance - row, query);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const bf16x2 b[2] = {k.at[i], k.at[i + 1]};
      multiply_sums<P>(sums[piece], query[i / 2].at, b);
    }
  }
  add_pieces(params, scales, sums, scores);
  if (decays) {  // row g of the product is that of key g: what counts is its diagonal
    const int h = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) scores[i] = __shfl_sync(0xffffffffu, scores[i], 4 * (2 * h + i) + h);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (2 * (lane_id() % 4) + i > distance) scores[i] = -__builtin_inff();
  }
}

// Adds 8 keys, of which this lane has two weights, with the values of a stage.
template <class P>
__device__ __forceinline__ void add_values(const P& params, Softmax& softmax, const float (&weights)[2],
                                           int slot) {
  const int d = params.head_dim, row = lane_id() % 8;
  bf16x2 b[2];
  split_pair(weights[0], weights[1], b[0], b[1]);
#pragma unroll
  for (int tile = 0; tile < 8; tile += 2) {
    if (16 * tile >= d) break;
    const int channel = min(16 * tile + lane_id() / 8 * 8, d - 8);
    bf16x2 v[4];
    ldmatrix<true>(v, shared_array<bf16>(static_cast<std::size_t>(slot + 2 * (row * d + channel))).data);
    const bf16x2 first[4] = {v[0], v[1], v[0], v[1]}, second[4] = {v[2], v[3], v[2], v[3]};
    mma_bf16(softmax.out[tile], first, b);
    if (16 * tile + 16 < d) mma_bf16(softmax.out[tile + 1], second, b);
  }
}

// The same of an int8 cache. A register of ldmatrix has two channels of two keys: rows g and g + 8 of the product.
template <class P>
__device__ __forceinline__ void add_int8_values(const P& params, Softmax& softmax, const float (&weights)[2],
                                                const TwoScales& scales, int slot) {
  const Int8Stage stage = int8_stage(params, slot);
  const int pieces = params.head_dim / 16, row = lane_id() % 8;
  constexpr int scale_word = Int8Page::value_scale / 4;
  int largest = max(static_cast<int>(scales[0].at[scale_word]), static_cast<int>(scales[1].at[scale_word]));
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  constexpr int exponent = 0x7f800000, last_unit = 0x7e800000;  // 2^126, so that its inverse is a number, too
  const int unit = min(largest & exponent, last_unit);
  const auto inverse = [](int bits) {
    return __uint_as_float(static_cast<std::uint32_t>(0x7f000000 - bits));
  };
  if (unit > softmax.unit) {
    const float smaller = __uint_as_float(static_cast<std::uint32_t>(softmax.unit)) * inverse(unit);
#pragma unroll
    for (float (&tile)[4] : softmax.out) {
      tile[0] *= smaller;
      tile[2] *= smaller;
    }
    softmax.unit = unit;
  }
  const float of_unit = inverse(softmax.unit);
  f16x2 b[2];
  split_pair_f16(weights[0] * (value_scale(scales[0]) * of_unit),
                 weights[1] * (value_scale(scales[1]) * of_unit), b[0], b[1]);
#pragma unroll
  for (int first = 0; first < 8; first += 4) {
    if (first >= pieces) break;
    const int piece = min(first + lane_id() / 8, pieces - 1);
    std::uint32_t v[4];
    ldmatrix<true>(v, shared_array<bf16>(static_cast<std::size_t>(stage.values(row, piece))).data);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i >= pieces) break;
      const f16x2 even = from_bytes(v[i], even_two), odd = from_bytes(v[i], odd_two);
      const f16x2 a[4] = {even, odd, even, odd};
      mma_f16(softmax.out[first + i], a, b);
    }
  }
}

// The new token's own row, which was not in memory yet when its page was loaded.
struct OwnRow {
  Packed<bf16x2, 4> key, value;  // 8 channels in each of the first d / 8 lanes

  template <class P>
  __device__ __forceinline__ void put(const P& params, bool values, int slot, int inner) const {
    Packed<bf16x2, 4> eight;
#pragma unroll
    for (int i = 0; i < 4; ++i) eight.at[i] = values ? value.at[i] : key.at[i];
    if (8 * lane_id() < params.head_dim) {
      shared_array<Packed<bf16x2, 4>>(
          static_cast<std::size_t>(slot + 2 * inner * params.head_dim))[lane_id()] = eight;
    }
    __syncwarp();
  }
};

// Splits of a head joined in order, out of their normalised values and the base 2 logarithms of their weights.
template <class Value, class LogWeight>
__device__ __forceinline__ float join_splits(int count, const Value& value, const LogWeight& log_weight) {
  float highest = -__builtin_inff(), sum = 0, joined = 0;
  for (int split = 0; split < count; ++split) highest = fmaxf(highest, log_weight(split));
  for (int split = 0; split < count; ++split) {
    const float weight = quick_exp2(log_weight(split) - highest);
    sum += weight;
    joined += weight * value(split);
  }
  return joined * quick_reciprocal(sum);
}

// What the warps of a block tell each other of a split, and what each thread keeps of its channel's splits.
struct Exchange {
  SharedArray<float> row_max, row_sum, out;     // of each warp; out (warps, d)
  SharedArray<float> split_values, split_lses;  // (splits, d)

  __device__ __forceinline__ Exchange(const SharedLayout& layout, int d, int parity)
      : row_max(shared_array<float>(static_cast<std::size_t>(layout.partials)) +
                parity * decode_warps * (d + 2)),
        row_sum(row_max + decode_warps),
        out(row_sum + decode_warps),
        split_values(shared_array<float>(static_cast<std::size_t>(layout.partials)) +
                     2 * decode_warps * (d + 2)),
        split_lses(split_values + max_kv_splits * d) {}
};
inline int exchange_bytes(int d) {
  return (2 * decode_warps * (d + 2) + 2 * max_kv_splits * d) * static_cast<int>(sizeof(float));
}

// This thread's channel of a split, gated, and the base 2 logarithm of the split's weight.
struct SplitResult {
  float value, lse;
};
__device__ __forceinline__ SplitResult join_warps(const Exchange& exchange, int d, int channel, float gate) {
  static_assert(decode_warps == 8);
  const SharedArray<Packed<float, 4>> tops{reinterpret_cast<Packed<float, 4>*>(exchange.row_max.data)};
  const Packed<float, 4> row_max[2] = {tops[0], tops[1]}, row_sum[2] = {tops[2], tops[3]};
  float highest = -__builtin_inff(), sum = 0, value = 0;
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) highest = fmaxf(highest, row_max[warp / 4].at[warp % 4]);
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) {
    const float weight = quick_exp2(row_max[warp / 4].at[warp % 4] - highest);
    sum += weight * row_sum[warp / 4].at[warp % 4];
    value += weight * exchange.out[warp * d + channel];
  }
  return {rounded<bf16>(value * quick_reciprocal(sum * (1.0f + quick_exp(-gate)))),
          highest + quick_log2(sum)};
}

// Scores of 8 keys to weights, this lane's two.
__device__ __forceinline__ void soften(Softmax& softmax, float (&weights)[2]) {
  float highest = fmaxf(weights[0], weights[1]);
  highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
  highest = fmaxf(fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2)), softmax.row_max);
  if (highest > softmax.row_max && softmax.row_max > -__builtin_inff()) {
    const float decay = quick_exp2(softmax.row_max - highest);
    softmax.row_sum *= decay;
#pragma unroll
    for (float (&tile)[4] : softmax.out) {
      tile[0] *= decay;
      tile[2] *= decay;
    }
  }
  softmax.row_max = highest;
  const float base = highest == -__builtin_inff() ? 0.0f : highest;  // nothing seen yet
#pragma unroll
  for (float& weight : weights) softmax.row_sum += weight = quick_exp2(weight - base);
}

// A page of a split: the keys' stage, then the values'; of an int8 cache, one. `distance`: of the new token from this
// warp's first row.
template <class Stages, class P>
__device__ __forceinline__ void attend_page(const P& params, const SharedLayout& layout, Stages& loader,
                                            const Query& q, const OwnRow& own, int distance,
                                            Softmax& softmax) {
  const bool has_own = distance >= 0 && distance < page_rows_of_warp;
  float weights[2];
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int slot = loader.wait();
    if (has_own) own.put(params, which == 1, slot, distance);
    if (which == 0) {
      score(params, layout, q, slot, distance, {}, weights);
      soften(softmax, weights);
    } else {
      add_values(params, softmax, weights, slot);
    }
    loader.refill();
  }
}
template <class Stages, class P>
__device__ __forceinline__ void attend_page(const P& params, const SharedLayout& layout, Stages& loader,
                                            const Query& q, const OwnInt8Row& own, int distance,
                                            Softmax& softmax) {
  const int slot = loader.wait();
  if (distance >= 0 && distance < page_rows_of_warp) own.put(params, slot, distance);
  float weights[2];
  TwoScales scales;
  read_scales(params, slot, scales);
  score(params, layout, q, slot, distance, scales, weights);
  soften(softmax, weights);
  add_int8_values(params, softmax, weights, scales, slot);
  loader.refill();
}

template <class P>
__device__ __forceinline__ void tell(const P& params, const Exchange& exchange, const Softmax& softmax) {
  const int d = params.head_dim;
  float row_sum = softmax.row_sum;
  row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 1);
  row_sum += __shfl_xor_sync(0xffffffffu, row_sum, 2);
  if (lane_id() == 0) {
    exchange.row_max[warp_id()] = softmax.row_max;
    exchange.row_sum[warp_id()] = row_sum;
  }
  if (lane_id() % 4 != 0) return;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    if (16 * tile >= d) break;
    if constexpr (P::int8_cache) {
      const int channel = warp_id() * d + 16 * tile + 2 * (lane_id() / 4);
      const float unit = __uint_as_float(static_cast<std::uint32_t>(softmax.unit));
      exchange.out[channel] = softmax.out[tile][0] * unit;
      exchange.out[channel + 1] = softmax.out[tile][2] * unit;
    } else {
      const int channel = warp_id() * d + 16 * tile + lane_id() / 4;
      exchange.out[channel] = softmax.out[tile][0];
      exchange.out[channel + 8] = softmax.out[tile][2];
    }
  }
}

// What a task reads when it begins: a head's query and gate, and the new token's own row.
template <class P>
struct TaskStart {
  Query q;
  std::conditional_t<P::int8_cache, OwnInt8Row, OwnRow> own;
  float gate;

  __device__ __forceinline__ void read(const P& params, const PageEntry& page, int slot) {
    const int d = params.head_dim, width = params.attention_width(), channel = static_cast<int>(threadIdx.x);
    const int head_row = page.request * width + page.head * d;
    const bf16x2* const query = static_cast<const bf16x2*>(params.q) + head_row + query_channel(0);
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        q.pieces[piece][half] = Packed<bf16x2, 4>{};
        if (query_channel(piece) < d) q.pieces[piece][half] = load_packed<4>(query + 32 * piece + 4 * half);
      }
    }
    const int inner = page.earlier % page_tokens - page_rows_of_warp * warp_id();
    const bool has_own =
        (page.marks & PageEntry::task_has_own_row) != 0 && inner >= 0 && inner < page_rows_of_warp;
    if constexpr (P::int8_cache) {
      if (has_own) {
        own.read(params, page.request, page.head);
        const int row = static_cast<int>(HRMCORE_REQUEST_STATE(std::int64_t, slot_mapping)[page.request]);
        own.append(params, params.page_at(slot, row / page_tokens, page.head), row % page_tokens);
      }
    } else if (has_own && 8 * lane_id() < d) {
      const std::int64_t at = HRMCORE_REQUEST_STATE(std::int64_t, slot_mapping)[page.request] * width +
                              page.head * d + 8 * lane_id();
      own.key = load_packed<4>(reinterpret_cast<const bf16x2*>(cache_of(params, slot, 0) + at));
      own.value = load_packed<4>(reinterpret_cast<const bf16x2*>(cache_of(params, slot, 1) + at));
    }
    gate = channel < d ? load_one(params.gate + head_row + channel) : 0.0f;
  }
};

// The end of a split, and of a task where a block has all splits of a head. `parity` is that of the exchange.
template <Packing packing, class P>
__device__ __forceinline__ void finish_split(const P& params, const SharedLayout& layout,
                                             const PageEntry& page, const Softmax& softmax, float gate,
                                             int parity) {
  const int d = params.head_dim, width = params.attention_width(), channel = static_cast<int>(threadIdx.x);
  const Exchange exchange(layout, d, parity);
  tell(params, exchange, softmax);
  __syncthreads();
  if (channel >= d) return;
  const SplitResult result = join_warps(exchange, d, channel, gate);
  if (params.splits_apart) {
    const int row = page.request * max_kv_splits + page.split;
    store<1>(static_cast<bf16*>(params.attended) + row * width + page.head * d + channel,
             Floats<1>{{result.value}});
    if (channel == 0) {
      const int of_split = (page.request * params.heads + page.head) * max_kv_splits + page.split;
      store<1>(params.split_lse + of_split, Floats<1>{{result.lse}});
    }
    return;
  }
  exchange.split_values[page.split * d + channel] = result.value;
  exchange.split_lses[page.split * d + channel] = result.lse;
  if ((page.marks & PageEntry::task_ends) == 0) return;
  const float joined = join_splits(
      page.split + 1, [&](int split) -> float { return exchange.split_values[split * d + channel]; },
      [&](int split) -> float { return exchange.split_lses[split * d + channel]; });
  const int of_all = page.head * d + channel;
  store_activation<packing>(params.attended, (of_all / 16 * params.rows() + page.request) * 16 + of_all % 16,
                            joined);
}

template <Packing packing, class Stages, class P>
__device__ __forceinline__ void attend(const P& params, const SharedLayout& layout, Stages& loader,
                                       int slot) {
  const SharedArray<PageEntry> list = shared_array<PageEntry>(static_cast<std::size_t>(layout.pages));
  const int entries = HRMCORE_REQUEST_STATE(int, page_entries)[0];
  TaskStart<P> task;  // read by the first page of each task
  Softmax softmax;
#pragma unroll 1
  for (int entry = 0, parity = 0; entry < entries; ++entry) {
    const PageEntry page = list[entry];
    if ((page.marks & PageEntry::task_begins) != 0) task.read(params, page, slot);
    attend_page(params, layout, loader, task.q, task.own, page.earlier - page_rows_of_warp * warp_id(),
                softmax);
    if ((page.marks & PageEntry::split_ends) != 0) {
      finish_split<packing>(params, layout, page, softmax, task.gate, parity);
      softmax = Softmax{};
      parity ^= 1;
    }
  }
}

// Eight channels of a request's attention, whose splits lay in blocks of their own, joined.
template <Packing packing, class P>
__device__ __forceinline__ ActivationPiece<packing> attended_channels(const P& params, int request, int k) {
  const int width = params.attention_width(), row = request * max_kv_splits * width + k;
  const int count = HRMCORE_REQUEST_STATE(int, kv_splits)[request];
  const auto* values = reinterpret_cast<const std::byte*>(static_cast<const bf16*>(params.attended) + row);
  const float* lse = params.split_lse + (request * params.heads + (k >> params.head_shift)) * max_kv_splits;
  // As join_splits, four splits at a time: their weights are those of all channels. What lies beyond the last split
  // is the last one, without weight.
  constexpr int together = max_kv_splits / 2;
  float weights[max_kv_splits], highest = -__builtin_inff(), sum = 0;
  Packed<bf16x2, 4> of_split[together];
  const auto read_values = [&](int first) {
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const std::int64_t split = min(first + i, count - 1);
      of_split[i] = load_packed<4>(reinterpret_cast<const bf16x2*>(values + split * (2 * width)));
    }
  };
  const auto read_weights = [&](int first) {
    const Packed<float, together> four = load_packed<together>(lse + first);
#pragma unroll
    for (int i = 0; i < together; ++i) {
      weights[first + i] = first + i < count ? four.at[i] : -__builtin_inff();
      highest = fmaxf(highest, weights[first + i]);
    }
  };
  Floats<8> joined{};
  const auto add = [&](int first) {
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const float weight = quick_exp2(weights[first + i] - highest);
      sum += weight;
#pragma unroll
      for (int c = 0; c < 8; ++c) joined[c] += weight * half_of(of_split[i].at[c / 2], c % 2);
    }
  };
  read_values(0);
  read_weights(0);
  if (count > together) read_weights(together);
  add(0);
  if (count > together) {
    read_values(together);
    add(together);
  }
  const float inverse = quick_reciprocal(sum) * ActivationOf<packing>::scale;
  ActivationPiece<packing> piece;
#pragma unroll
  for (int c = 0; c < 8; ++c) assign(piece.at[c], joined[c] * inverse);
  return piece;
}

}  // namespace hrmcore::cuda
