// Attention of one new token of each request over its cache. A request's pages of 64 keys are cut into up to 8
// splits, which follow from its length alone; a warp sees 8 rows of every page of a split.
//
// The splits of a head lie in blocks of their own where that is faster, and the phase after joins them;
// otherwise a block takes them one after the other and joins them itself. The bits are the same.
#pragma once

#include "decode/loader.cuh"

namespace hrmcore::cuda {

// The pages that a token sees: with a window its own block of the window and the one before.
struct VisiblePages {
  int first, count;
};
__device__ __forceinline__ VisiblePages visible_pages(const DecodeParams& params, int position) {
  const int low = params.window == 0 ? 0 : max(0, (position / params.window - 1) * params.window);
  return {low / page_tokens, position / page_tokens + 1 - low / page_tokens};
}

// Lists the pages that this block attends to. One warp does; a page in each lane.
__device__ __forceinline__ void list_pages(const DecodeParams& params, const SharedLayout& layout) {
  const SharedArray<PageEntry> list = shared_array<PageEntry>(static_cast<std::size_t>(layout.pages));
  int count = 0;
  for (int number = static_cast<int>(blockIdx.x), tasks = attention_tasks(params); number < tasks;
       number += static_cast<int>(gridDim.x)) {
    const AttentionTask task = attention_task(params, number);
    for (int page = task.page + lane_id(); page < task.end; page += 32) {
      const int position = HRMCORE_REQUEST_STATE(int, position)[task.request];
      list[count + page - task.page] = {page_of(params, task.request, page) * page_tokens, task.request,
                                        task.head, position - page * page_tokens};
    }
    count += task.end - task.page;
  }
  if (lane_id() == 0) HRMCORE_REQUEST_STATE(int, page_entries)[0] = count;
}

// What a launch reads once of its requests: where the new tokens stand and go, what they see, their angles.
__device__ __forceinline__ void load_request_state(const DecodeParams& params, const SharedLayout& layout) {
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
  for (int i = static_cast<int>(threadIdx.x); i < params.batch * d; i += decode_threads) {
    const std::int64_t position = HRMCORE_REQUEST_STATE(int, position)[i >> params.head_shift];
    angles[i] = load_one(params.rope + position * d + (i & (d - 1)));
  }
  if (params.log_decay != nullptr && static_cast<int>(threadIdx.x) < d / 2) {
    log_decay[static_cast<int>(threadIdx.x)] = load_one(params.log_decay + threadIdx.x);
  }
  if (warp_id() == 0) list_pages(params, layout);
  __syncthreads();
}

// The queries of a head as a lane multiplies them: four lanes share a key, each takes every fourth 8 channels.
struct Query {
  Floats<8> at[4];
};
__device__ __forceinline__ int query_channel(int piece) { return 8 * (lane_id() % 4 + 4 * piece); }

// The softmax of a warp's keys so far, and of its values two channels in each lane, and two more from 64 on.
struct Softmax {
  float row_max = -__builtin_inff(), row_sum = 0;
  float out[2][2] = {};
};

__device__ __forceinline__ float max_over_keys(float x) {
#pragma unroll
  for (int by = 4; by < 32; by *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
  return x;
}
__device__ __forceinline__ float sum_over_keys(float x) {
#pragma unroll
  for (int by = 4; by < 32; by *= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}

// This lane's key of the 8 in a stage: q k, each channel decayed by the distance under xPos.
__device__ __forceinline__ float score(const DecodeParams& params, const SharedLayout& layout, const Query& q,
                                       int slot, int distance) {
  const int d = params.head_dim, key = lane_id() / 4;
  const SharedArray<Packed<bf16, 8>> row =
      shared_array<Packed<bf16, 8>>(static_cast<std::size_t>(slot + key * d * 2));
  const SharedArray<float> log_decay = shared_array<float>(static_cast<std::size_t>(layout.log_decay));
  float sum = 0;
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    const int channel = query_channel(piece);
    if (channel >= d) continue;
    const Packed<bf16, 8> k = row[channel / 8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float product = q.at[piece][c] * to_float(k.at[c]);
      if (params.log_decay != nullptr) {
        product *= quick_exp(log_decay[(channel + c) & (d / 2 - 1)] * static_cast<float>(distance));
      }
      sum += product;
    }
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  return distance >= 0 ? sum : -__builtin_inff();
}

// Adds 8 keys, whose weights are to be exp(score), with the values of a stage.
__device__ __forceinline__ void add_values(const DecodeParams& params, Softmax& softmax, float weight,
                                           int slot) {
  const int d = params.head_dim;
#pragma unroll
  for (int key = 0; key < page_rows_of_warp; ++key) {
    const float of_key = __shfl_sync(0xffffffffu, weight, 4 * key);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int channel = 2 * lane_id() + 64 * j;
      if (channel >= d) continue;
      const Packed<bf16, 2> v =
          shared_array<Packed<bf16, 2>>(static_cast<std::size_t>(slot + 2 * (key * d + channel)))[0];
      softmax.out[j][0] += of_key * to_float(v.at[0]);
      softmax.out[j][1] += of_key * to_float(v.at[1]);
    }
  }
}

// The new token's own row, which was not in memory yet when its page was loaded.
struct OwnRow {
  Packed<bf16x2, 4> key, value;  // 8 channels in each of the first d / 8 lanes

  __device__ __forceinline__ void put(const DecodeParams& params, bool values, int slot, int inner) const {
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
  float highest = -__builtin_inff(), sum = 0, value = 0;
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) highest = fmaxf(highest, exchange.row_max[warp]);
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) {
    const float weight = quick_exp(exchange.row_max[warp] - highest);
    sum += weight * exchange.row_sum[warp];
    value += weight * exchange.out[warp * d + channel];
  }
  return {rounded<bf16>(value * quick_reciprocal(sum * (1.0f + quick_exp(-gate)))), highest + quick_log(sum)};
}

// A page of a split: the keys' stage, then the values'.
template <class Stages>
__device__ __forceinline__ void attend_page(const DecodeParams& params, const SharedLayout& layout,
                                            Stages& loader, const Query& q, const OwnRow& own, int own_inner,
                                            int distance, Softmax& softmax) {
  float weight = 0;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const int slot = loader.wait();
    if (own_inner >= 0) own.put(params, which == 1, slot, own_inner);
    if (which == 0) {
      const float of_key = score(params, layout, q, slot, distance);
      const float highest = fmaxf(softmax.row_max, max_over_keys(of_key));
      const float base = highest == -__builtin_inff() ? 0.0f : highest;  // nothing seen yet
      const float decay = quick_exp(softmax.row_max - base);
      weight = quick_exp(of_key - base);
      softmax.row_max = highest;
      softmax.row_sum = softmax.row_sum * decay + sum_over_keys(weight);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        softmax.out[j][0] *= decay;
        softmax.out[j][1] *= decay;
      }
    } else {
      add_values(params, softmax, weight, slot);
    }
    loader.refill();
  }
}

__device__ __forceinline__ void tell(const Exchange& exchange, const Softmax& softmax, int d) {
  if (lane_id() == 0) {
    exchange.row_max[warp_id()] = softmax.row_max;
    exchange.row_sum[warp_id()] = softmax.row_sum;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int channel = 2 * lane_id() + 64 * j;
    if (channel >= d) continue;
    exchange.out[warp_id() * d + channel] = softmax.out[j][0];
    exchange.out[warp_id() * d + channel + 1] = softmax.out[j][1];
  }
}

// One task: a head of a request over one split, or over all of them. `parity` is that of the exchange.
template <class Stages>
__device__ __forceinline__ void attend_task(const DecodeParams& params, const SharedLayout& layout,
                                            Stages& loader, int slot, const AttentionTask& task,
                                            int& parity) {
  const int d = params.head_dim, width = params.attention_width(), channel = static_cast<int>(threadIdx.x);
  const int position = HRMCORE_REQUEST_STATE(int, position)[task.request];
  const int head_row = task.request * width + task.head * d;
  Query q;
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    if (query_channel(piece) < d) q.at[piece] = load<8>(params.q + head_row + query_channel(piece));
  }
  int own_inner = position % page_tokens - page_rows_of_warp * warp_id();
  if (own_inner >= page_rows_of_warp || task.end <= position / page_tokens)
    own_inner = -1;  // not this warp's
  OwnRow own{};
  if (own_inner >= 0 && 8 * lane_id() < d) {
    const std::int64_t at = HRMCORE_REQUEST_STATE(std::int64_t, slot_mapping)[task.request] * width +
                            task.head * d + 8 * lane_id();
    own.key = load_packed<4>(reinterpret_cast<const bf16x2*>(cache_of(params, slot, 0) + at));
    own.value = load_packed<4>(reinterpret_cast<const bf16x2*>(cache_of(params, slot, 1) + at));
  }
  const float gate = channel < d ? load_one(params.gate + head_row + channel) : 0.0f;

  for (int split = task.first_split, page = task.page; split < task.last_split; ++split, parity ^= 1) {
    Softmax softmax;
    for (const int end = split_begin(task.request, split + 1); page < end; ++page) {
      const int distance = position - page * page_tokens - page_rows_of_warp * warp_id() - lane_id() / 4;
      attend_page(params, layout, loader, q, own, page == position / page_tokens ? own_inner : -1, distance,
                  softmax);
    }
    const Exchange exchange(layout, d, parity);
    tell(exchange, softmax, d);
    __syncthreads();
    if (channel >= d) continue;
    const SplitResult result = join_warps(exchange, d, channel, gate);
    if (params.splits_apart) {
      const int row = task.request * max_kv_splits + split;
      store<1>(static_cast<bf16*>(params.attended) + row * width + task.head * d + channel,
               Floats<1>{{result.value}});
      if (channel == 0) store<1>(params.split_lse + row * params.heads + task.head, Floats<1>{{result.lse}});
    } else {
      exchange.split_values[split * d + channel] = result.value;
      exchange.split_lses[split * d + channel] = result.lse;
    }
  }
  if (params.splits_apart || channel >= d) return;
  const Exchange exchange(layout, d, 0);
  const float joined = join_splits(
      task.last_split, [&](int split) -> float { return exchange.split_values[split * d + channel]; },
      [&](int split) -> float { return exchange.split_lses[split * d + channel]; });
  store<1>(
      static_cast<bf16*>(params.attended) + task.request * max_kv_splits * width + task.head * d + channel,
      Floats<1>{{joined}});
}

template <class Stages>
__device__ __forceinline__ void attend(const DecodeParams& params, const SharedLayout& layout, Stages& loader,
                                       int slot) {
  int parity = 0;
  for (int number = static_cast<int>(blockIdx.x), tasks = attention_tasks(params); number < tasks;
       number += static_cast<int>(gridDim.x)) {
    const AttentionTask task = attention_task(params, number);
    if (task.any()) attend_task(params, layout, loader, slot, task, parity);
  }
}

// Eight channels of a request's attention, its splits joined.
__device__ __forceinline__ Packed<bf16, 8> attended_channels(const DecodeParams& params, int request, int k) {
  const int width = params.attention_width(), head = k >> params.head_shift;
  const int count = params.splits_apart ? HRMCORE_REQUEST_STATE(int, kv_splits)[request] : 1;
  const bf16* rows = static_cast<const bf16*>(params.attended) + request * max_kv_splits * width + k;
  if (count == 1) return load_packed<8>(rows);
  Packed<bf16, 8> values[max_kv_splits];
  float log_weights[max_kv_splits];  // and then the weights
#pragma unroll
  for (int split = 0; split < max_kv_splits; ++split) {
    values[split] = Packed<bf16, 8>{};
    log_weights[split] = -__builtin_inff();
    if (split < count) {
      values[split] = load_packed<8>(rows + split * width);
      log_weights[split] =
          load_one(params.split_lse + (request * max_kv_splits + split) * params.heads + head);
    }
  }
  // As join_splits, whose weights are those of all channels.
  float highest = -__builtin_inff(), sum = 0;
#pragma unroll
  for (const float& log_weight : log_weights) highest = fmaxf(highest, log_weight);
#pragma unroll
  for (float& log_weight : log_weights) sum += log_weight = quick_exp(log_weight - highest);
  const float inverse = quick_reciprocal(sum);
  Packed<bf16, 8> joined;
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    float channel = 0;
#pragma unroll
    for (int split = 0; split < max_kv_splits; ++split)
      channel += log_weights[split] * to_float(values[split].at[c]);
    joined.at[c] = to_bf16(channel * inverse);
  }
  return joined;
}

}  // namespace hrmcore::cuda
