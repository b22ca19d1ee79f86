// Attention of one new token of each request over its cache. A request's keys are cut, by pages of 64, into
// up to 4 splits, each a block's of the grid; which is which follows from its length alone.
//
// d / 8 lanes share a key, 8 channels each. The groups of lanes see the keys in turn, each with a softmax of
// its own, and are joined in order.
#pragma once

#include "decode/weight_stream.cuh"

namespace hrmcore::cuda {

constexpr int most_groups_in_flight = 4;  // keys of a group that are loaded together

__device__ __forceinline__ int clamped(int value, int count) { return max(0, min(value, count - 1)); }

// A page of a request's table.
__device__ __forceinline__ int page_of(const DecodeParams& params, int request, int number) {
  return clamped(load_one(params.tables + request * params.table_length + number), params.cache_pages);
}

// Where the requests' new tokens stand, and the rows of the cache that they get: read once a launch.
static_assert(max_batch * (sizeof(std::int64_t) + sizeof(int)) <= activations_offset - positions_offset, "");
__device__ __forceinline__ SharedArray<std::int64_t> slot_mapping() {
  return shared_array<std::int64_t>(positions_offset);
}
__device__ __forceinline__ SharedArray<int> positions() {
  return shared_array<int>(positions_offset + max_batch * static_cast<int>(sizeof(std::int64_t)));
}
__device__ __forceinline__ void load_positions(const DecodeParams& params) {
  const int request = static_cast<int>(threadIdx.x);
  if (request < params.batch) {
    const int position = clamped(load_one(params.positions + request),
                                 min(params.table_length * page_tokens, params.rotations));
    positions()[request] = position;
    slot_mapping()[request] =
        static_cast<std::int64_t>(page_of(params, request, position / page_tokens)) * page_tokens +
        position % page_tokens;
  }
  __syncthreads();
}

// Keys (which = 0) or values (1) of a slot: (tokens, attention width).
__device__ __forceinline__ bf16* cache_of(const DecodeParams& params, int slot, int which) {
  const std::int64_t rows = static_cast<std::int64_t>(params.cache_pages) * page_tokens;
  return static_cast<bf16*>(params.kv) + (2 * slot + which) * rows * params.attention_width();
}

// The pages of keys that a token sees, and how they are cut: into splits of 4 at least, which all blocks of
// the next phase read.
struct KvSplits {
  int first, pages, count;

  __device__ __forceinline__ int begin(int split) const { return first + pages * split / count; }
};

__device__ __forceinline__ KvSplits kv_splits_of(const DecodeParams& params, int position) {
  const int low = params.window == 0 ? 0 : max(0, (position / params.window - 1) * params.window);
  const int first = low / page_tokens, pages = position / page_tokens + 1 - first;
  return {first, pages, min((pages + 3) / 4, max_kv_splits)};
}

// The lanes that share a key, and what they have of the keys they saw: each lane its 8 channels.
struct LaneGroup {
  int lanes, groups, group;
};
struct GroupSoftmax {
  Floats<8> out{};
  float row_max = -__builtin_inff(), row_sum = 0;
};

// Takes in the keys of a page that fall to this lane's group. `first`: the distance of the page's first key.
__device__ __forceinline__ void visit_page(const bf16* keys, const bf16* values, int width,
                                           const LaneGroup& own, int first, const Floats<8>& q, bool xpos,
                                           const Floats<8>& log_decay, GroupSoftmax& softmax) {
  Packed<bf16, 8> k[most_groups_in_flight], v[most_groups_in_flight];
  float score[most_groups_in_flight];
#pragma unroll
  for (int i = 0; i < most_groups_in_flight; ++i) {
    const int inner = own.group + own.groups * i;
    k[i] = v[i] = Packed<bf16, 8>{};
    if (inner < page_tokens && inner <= first) {
      k[i] = load_packed<8>(keys + inner * width);
      v[i] = load_packed<8>(values + inner * width);
    }
  }
  float highest = softmax.row_max;
#pragma unroll
  for (int i = 0; i < most_groups_in_flight; ++i) {
    const int inner = own.group + own.groups * i, distance = first - inner;
    float sum = 0;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float decay = !xpos ? 1.0f : expf(log_decay[c] * static_cast<float>(distance));
      sum += q[c] * to_float(k[i].at[c]) * decay;
    }
    for (int by = own.lanes / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    score[i] = inner < page_tokens && distance >= 0 ? sum : -__builtin_inff();
    highest = fmaxf(highest, score[i]);
  }
  const float base = highest == -__builtin_inff() ? 0.0f : highest;  // a group that has seen nothing yet
  const float rescale = expf(softmax.row_max - base);
  softmax.row_sum *= rescale;
#pragma unroll
  for (int c = 0; c < 8; ++c) softmax.out[c] *= rescale;
#pragma unroll
  for (int i = 0; i < most_groups_in_flight; ++i) {
    const float weight = expf(score[i] - base);
    softmax.row_sum += weight;
#pragma unroll
    for (int c = 0; c < 8; ++c) softmax.out[c] += weight * to_float(v[i].at[c]);
  }
  softmax.row_max = highest;
}

// Joins the groups of lanes in order, and writes the split's gated output and the logarithm of its weight.
__device__ __forceinline__ void join_groups(const DecodeParams& params, int request, int head, int split,
                                            int groups, const SharedArray<float>& group_max,
                                            const SharedArray<float>& group_sum,
                                            const SharedArray<float>& outs) {
  const int d = params.head_dim, width = params.attention_width(), mine = static_cast<int>(threadIdx.x);
  if (mine < d) {
    float highest = -__builtin_inff(), sum = 0, value = 0;
    for (int g = 0; g < groups; ++g) highest = fmaxf(highest, group_max[g]);
    for (int g = 0; g < groups; ++g) {
      const float weight = expf(group_max[g] - highest);
      sum += weight * group_sum[g];
      value += weight * outs[g * d + mine];
    }
    const float gate = load<1>(params.gate + request * width + head * d + mine)[0];
    const int row = request * max_kv_splits + split;
    store<1>(static_cast<bf16*>(params.split_out) + row * width + head * d + mine,
             Floats<1>{{value / sum / (1.0f + expf(-gate))}});
    if (mine == 0) store<1>(params.split_lse + row * params.heads + head, Floats<1>{{highest + logf(sum)}});
  }
}

// One split of one head of one request: writes its gated output and the logarithm of its weight.
__device__ __forceinline__ void attend_split(const DecodeParams& params, int slot, int request, int head,
                                             int split) {
  const int position = positions()[request], d = params.head_dim, lanes = d / 8;
  const KvSplits splits = kv_splits_of(params, position);
  if (split >= splits.count) return;
  const int width = params.attention_width(), groups = decode_threads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes,
            channel = static_cast<int>(threadIdx.x) % lanes * 8;
  const bf16 *keys = cache_of(params, slot, 0) + head * d + channel,
             *values = cache_of(params, slot, 1) + head * d + channel;
  const SharedArray<float> group_max = shared_array<float>(activations_offset),
                           group_sum = group_max + groups, outs = group_sum + groups,
                           query = outs + groups * d;
  const int mine = static_cast<int>(threadIdx.x);  // the channel that this thread brings and takes away
  if (mine < d) {
    query[mine] = load<1>(params.q + request * width + head * d + mine)[0] / sqrtf(static_cast<float>(d));
  }
  __syncthreads();
  Floats<8> q, log_decay{};
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = query[channel + i];
  if (params.log_decay != nullptr) log_decay = load<8>(params.log_decay + channel % (d / 2));

  GroupSoftmax softmax;
  const int begin = splits.begin(split), end = splits.begin(split + 1);
  int ahead = 0;  // this lane's of the next 32 pages
  for (int page = begin; page < end; ++page) {
    const int turn = (page - begin) % 32;
    if (turn == 0 && page + lane_id() < end) ahead = page_of(params, request, page + lane_id());
    const std::int64_t row = static_cast<std::int64_t>(__shfl_sync(0xffffffffu, ahead, turn)) * page_tokens;
    visit_page(keys + row * width, values + row * width, width, {lanes, groups, group},
               position - page * page_tokens, q, params.log_decay != nullptr, log_decay, softmax);
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) outs[group * d + channel + i] = softmax.out[i];
  if (channel == 0) {
    group_max[group] = softmax.row_max;
    group_sum[group] = softmax.row_sum;
  }
  __syncthreads();
  join_groups(params, request, head, split, groups, group_max, group_sum, outs);
  __syncthreads();
}

__device__ __forceinline__ void attend(const DecodeParams& params, int slot) {
  const int tasks = params.batch * params.heads * max_kv_splits;
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
    const int request_head = task / max_kv_splits;
    attend_split(params, slot, request_head / params.heads, request_head % params.heads,
                 task % max_kv_splits);
  }
}

// Eight channels of a request's attention, its splits joined in order.
__device__ __forceinline__ Floats<8> joined_splits(const DecodeParams& params, int request, int splits,
                                                   int k) {
  const int head = k / params.head_dim, width = params.attention_width();
  const bf16* rows = static_cast<const bf16*>(params.split_out) + request * max_kv_splits * width + k;
  if (splits == 1) return load<8>(rows);
  float weights[max_kv_splits], highest = -__builtin_inff(), sum = 0;
#pragma unroll
  for (int split = 0; split < max_kv_splits; ++split) {
    weights[split] = -__builtin_inff();
    if (split < splits) {
      weights[split] = load<1>(params.split_lse + (request * max_kv_splits + split) * params.heads + head)[0];
    }
    highest = fmaxf(highest, weights[split]);
  }
#pragma unroll
  for (int split = 0; split < max_kv_splits; ++split) sum += expf(weights[split] - highest);
  Floats<8> out{};
#pragma unroll
  for (int split = 0; split < max_kv_splits; ++split) {
    if (split >= splits) continue;
    const float weight = expf(weights[split] - highest) / sum;
    const Floats<8> values = load<8>(rows + split * width);
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] += weight * values[c];
  }
  return out;
}

}  // namespace hrmcore::cuda
