// Attention of one new token of each request over its cache. A request's pages of 64 keys are cut into up to 8
// splits, which follow from its length alone; a warp sees 8 rows of every page of a split.
//
// The splits of a head lie in blocks of their own where that is faster, and the phase after joins them;
// otherwise a block takes them one after the other and joins them itself. The bits are the same.
//
// Both products are the tensor cores': 8 keys of head_dim 128 take 4 reads of shared memory and 8 mma for the scores,
// and as many for the values. Query and weights go in as sums of two bfloat16, in places that would be empty.
#pragma once

#include "decode/activations.cuh"

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

// The query of a head as the tensor cores take it: four lanes share a row, each has every fourth 8 channels. It is
// the sum of two bfloat16, 16 bits in all: rows 0 to 7 of a product are all the first, rows 8 to 15 the second.
struct Query {
  Packed<bf16x2, 4> high[4], low[4];
};
__device__ __forceinline__ int query_channel(int piece) { return 8 * (lane_id() % 4 + 4 * piece); }

// A piece of it with each channel decayed by the distance of this lane's key, of row lane / 4: xPos.
template <class P>
__device__ __forceinline__ void decay(const P& params, const SharedLayout& layout, int piece, int distance,
                                      Packed<bf16x2, 4>& high, Packed<bf16x2, 4>& low) {
  const SharedArray<float> log_decay = shared_array<float>(static_cast<std::size_t>(layout.log_decay));
  if (query_channel(piece) >= params.head_dim) return;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int channel = query_channel(piece) + 2 * pair + i;
      x[i] = (half_of(high.at[pair], i) + half_of(low.at[pair], i)) *
             quick_exp(log_decay[channel & (params.head_dim / 2 - 1)] * static_cast<float>(distance));
    }
    split_pair(x[0], x[1], high.at[pair], low.at[pair]);
  }
}

// The softmax of a warp's keys so far. Each lane has its own two keys' weights, and of each 16 channels lane
// 4g + h has the sums of g and g + 8, in the first and third place: the others are theirs again.
struct Softmax {
  float row_max = -__builtin_inff(), row_sum = 0;
  float out[8][4] = {};
};

// This lane's two keys of the 8 in a stage, 2 (lane % 4) and the next: q k.
template <class P>
__device__ __forceinline__ void score(const P& params, const SharedLayout& layout, const Query& q, int slot,
                                      int distance, float (&scores)[2]) {
  const int d = params.head_dim, row = lane_id() / 4;
  const SharedArray<Packed<bf16x2, 4>> key =
      shared_array<Packed<bf16x2, 4>>(static_cast<std::size_t>(slot + row * d * 2));
  const bool decays = params.log_decay != nullptr;
  float sums[4][4] = {};
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    if (32 * piece >= d) break;
    Packed<bf16x2, 4> k{}, high = q.high[piece], low = q.low[piece];
    if (query_channel(piece) < d) k = key[query_channel(piece) / 8];
    if (decays) decay(params, layout, piece, distance - row, high, low);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const bf16x2 a[4] = {high.at[i], low.at[i], high.at[i + 1], low.at[i + 1]};
      const bf16x2 b[2] = {k.at[i], k.at[i + 1]};
      mma_bf16(sums[piece], a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    scores[i] = (sums[0][i] + sums[0][i + 2]) + (sums[1][i] + sums[1][i + 2]) +
                ((sums[2][i] + sums[2][i + 2]) + (sums[3][i] + sums[3][i + 2]));
    if (decays) {  // row g of the product is that of key g: what counts is its diagonal
      const int h = lane_id() % 4;
      scores[i] = __shfl_sync(0xffffffffu, scores[i], 4 * (2 * h + i) + h);
    }
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

// Splits of a head joined in order, out of their normalised values and the logarithms of their weights.
template <class Value, class LogWeight>
__device__ __forceinline__ float join_splits(int count, const Value& value, const LogWeight& log_weight) {
  float highest = -__builtin_inff(), sum = 0, joined = 0;
  for (int split = 0; split < count; ++split) highest = fmaxf(highest, log_weight(split));
  for (int split = 0; split < count; ++split) {
    const float weight = quick_exp(log_weight(split) - highest);
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

// This thread's channel of a split, gated, and the logarithm of the split's weight.
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
    const float weight = quick_exp(row_max[warp / 4].at[warp % 4] - highest);
    sum += weight * row_sum[warp / 4].at[warp % 4];
    value += weight * exchange.out[warp * d + channel];
  }
  return {rounded<bf16>(value * quick_reciprocal(sum * (1.0f + quick_exp(-gate)))), highest + quick_log(sum)};
}

// A page of a split: the keys' stage, then the values'. `distance`: of the new token from this warp's first row.
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
      score(params, layout, q, slot, distance, weights);
      float highest = fmaxf(weights[0], weights[1]);
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2)), softmax.row_max);
      if (highest > softmax.row_max && softmax.row_max > -__builtin_inff()) {
        const float decay = quick_exp(softmax.row_max - highest);
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
      for (float& weight : weights) softmax.row_sum += weight = quick_exp(weight - base);
    } else {
      add_values(params, softmax, weights, slot);
    }
    loader.refill();
  }
}

__device__ __forceinline__ void tell(const Exchange& exchange, const Softmax& softmax, int d) {
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
    const int channel = warp_id() * d + 16 * tile + lane_id() / 4;
    exchange.out[channel] = softmax.out[tile][0];
    exchange.out[channel + 8] = softmax.out[tile][2];
  }
}

// What a task reads when it begins: a head's query and gate, and the new token's own row.
struct TaskStart {
  Query q;
  OwnRow own;
  float gate;

  template <class P>
  __device__ __forceinline__ void read(const P& params, const PageEntry& page, int slot) {
    const int d = params.head_dim, width = params.attention_width(), channel = static_cast<int>(threadIdx.x);
    const int head_row = page.request * width + page.head * d;
    const bf16x2 *high = static_cast<const bf16x2*>(params.q), *low = high + max_batch * width / 2;
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      q.high[piece] = q.low[piece] = Packed<bf16x2, 4>{};
      if (query_channel(piece) < d) {
        q.high[piece] = load_packed<4>(high + (head_row + query_channel(piece)) / 2);
        q.low[piece] = load_packed<4>(low + (head_row + query_channel(piece)) / 2);
      }
    }
    const int inner = page.earlier % page_tokens - page_rows_of_warp * warp_id();
    if ((page.marks & PageEntry::task_has_own_row) != 0 && inner >= 0 && inner < page_rows_of_warp &&
        8 * lane_id() < d) {
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
  tell(exchange, softmax, d);
  __syncthreads();
  if (channel >= d) return;
  const SplitResult result = join_warps(exchange, d, channel, gate);
  if (params.splits_apart) {
    const int row = page.request * max_kv_splits + page.split;
    store<1>(static_cast<bf16*>(params.attended) + row * width + page.head * d + channel,
             Floats<1>{{result.value}});
    if (channel == 0) store<1>(params.split_lse + row * params.heads + page.head, Floats<1>{{result.lse}});
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
  TaskStart task;  // read by the first page of each task
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
  const bf16* values = static_cast<const bf16*>(params.attended) + row;
  const float* lse = params.split_lse + request * max_kv_splits * params.heads + (k >> params.head_shift);
  // As join_splits, four splits at a time: their weights are those of all channels. What lies beyond the last split
  // is the last one, without weight.
  constexpr int together = max_kv_splits / 2;
  float weights[max_kv_splits], highest, sum = 0;
  Packed<bf16, 8> of_split[together];
  const auto read = [&](int first) {
#pragma unroll
    for (int split = first; split < first + together; ++split) {
      const int there = min(split, count - 1);
      weights[split] = load_one(lse + there * params.heads);
      of_split[split - first] = load_packed<8>(values + there * width);
    }
  };
  const auto highest_of = [&](int first) {
    return fmaxf(fmaxf(weights[first], weights[first + 1]), fmaxf(weights[first + 2], weights[first + 3]));
  };
  Floats<8> joined{};
  const auto add = [&](int first) {
#pragma unroll
    for (int split = first; split < first + together; ++split) {
      const float weight = split < count ? quick_exp(weights[split] - highest) : 0.0f;
      sum += weight;
#pragma unroll
      for (int c = 0; c < 8; ++c) joined[c] += weight * to_float(of_split[split - first].at[c]);
    }
  };
  read(0);
  highest = highest_of(0);
  if (count <= together) {
    add(0);
  } else {
#pragma unroll
    for (int split = together; split < max_kv_splits; ++split) {
      weights[split] = load_one(lse + min(split, count - 1) * params.heads);
    }
    highest = fmaxf(highest, highest_of(together));
    add(0);
    read(together);
    add(together);
  }
  const float inverse = quick_reciprocal(sum);
  ActivationPiece<packing> piece;
#pragma unroll
  for (int c = 0; c < 8; ++c) piece.at[c] = to_activation<packing>(joined[c] * inverse);
  return piece;
}

}  // namespace hrmcore::cuda
