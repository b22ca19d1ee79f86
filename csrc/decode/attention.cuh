// Attention of one new token of each request over its cache. A request's keys are cut, by blocks of 64, into
// up to 4 parts that lie in different blocks of the grid; which is which follows from its length alone.
//
// d / 8 lanes share a key, 8 channels each. The groups of lanes see the keys in turn, each with a softmax of
// its own, and are joined in order.
#pragma once

#include "decode/weight_stream.cuh"

namespace hrmcore::cuda {

constexpr int most_groups_in_flight = 4;  // keys of a group that are loaded together

__device__ __forceinline__ int clamped(int value, int count) { return max(0, min(value, count - 1)); }

// A block of a request's table.
__device__ __forceinline__ int block_of(const Step& step, int column, int number) {
  return clamped(load_one(step.tables + column * step.table_length + number), step.cache_blocks);
}

// Where the requests' new tokens stand, and the rows of the cache that they get: read once a launch.
static_assert(most_columns * (sizeof(std::int64_t) + sizeof(int)) <= activations_offset - places_offset, "");
__device__ __forceinline__ SharedArray<std::int64_t> new_rows() {
  return shared_array<std::int64_t>(places_offset);
}
__device__ __forceinline__ SharedArray<int> positions() {
  return shared_array<int>(places_offset + most_columns * static_cast<int>(sizeof(std::int64_t)));
}
__device__ __forceinline__ void load_places(const Step& step) {
  const int column = static_cast<int>(threadIdx.x);
  if (column < step.columns) {
    const int position =
        clamped(load_one(step.positions + column), min(step.table_length * cache_block, step.rotations));
    positions()[column] = position;
    new_rows()[column] =
        static_cast<std::int64_t>(block_of(step, column, position / cache_block)) * cache_block +
        position % cache_block;
  }
  __syncthreads();
}

// Keys (which = 0) or values (1) of a slot: (tokens, attention width).
__device__ __forceinline__ bf16* cache_of(const Step& step, int slot, int which) {
  const std::int64_t rows = static_cast<std::int64_t>(step.cache_blocks) * cache_block;
  return static_cast<bf16*>(step.kv) + (2 * slot + which) * rows * step.attention_width();
}

// The blocks of keys that a token sees, and how they are cut: into parts of 4 at least, which all blocks of
// the next phase read.
struct Parts {
  int first, blocks, count;

  __device__ __forceinline__ int begin(int part) const { return first + blocks * part / count; }
};

__device__ __forceinline__ Parts parts_of(const Step& step, int position) {
  const int low = step.window == 0 ? 0 : max(0, (position / step.window - 1) * step.window);
  const int first = low / cache_block, blocks = position / cache_block + 1 - first;
  return {first, blocks, min((blocks + 3) / 4, step_parts)};
}

// One part of one head of one request: writes its gated output and the logarithm of its weight.
__device__ __forceinline__ void attend_part(const Step& step, int slot, int column, int head, int part) {
  const int position = positions()[column], d = step.head_dim, lanes = d / 8;
  const Parts parts = parts_of(step, position);
  if (part >= parts.count) return;
  const int width = step.attention_width(), groups = step_threads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes,
            channel = static_cast<int>(threadIdx.x) % lanes * 8;
  const bf16 *keys = cache_of(step, slot, 0) + head * d + channel,
             *values = cache_of(step, slot, 1) + head * d + channel;
  const SharedArray<float> tops = shared_array<float>(activations_offset), totals = tops + groups,
                           outs = totals + groups, query = outs + groups * d;
  const int mine = static_cast<int>(threadIdx.x);  // the channel that this thread brings and takes away
  if (mine < d) {
    query[mine] = load<1>(step.q + column * width + head * d + mine)[0] / sqrtf(static_cast<float>(d));
  }
  __syncthreads();
  Floats<8> q, rates{};
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = query[channel + i];
  if (step.rates != nullptr) rates = load<8>(step.rates + channel % (d / 2));

  Floats<8> out{};
  float top = -__builtin_inff(), total = 0;
  const int begin = parts.begin(part), end = parts.begin(part + 1);
  int ahead = 0;  // this lane's of the next 32 blocks
  for (int block = begin; block < end; ++block) {
    const int turn = (block - begin) % 32;
    if (turn == 0 && block + step_lane() < end) ahead = block_of(step, column, block + step_lane());
    const std::int64_t row = static_cast<std::int64_t>(__shfl_sync(0xffffffffu, ahead, turn)) * cache_block;
    Packed<bf16, 8> k[most_groups_in_flight], v[most_groups_in_flight];
    float score[most_groups_in_flight];
#pragma unroll
    for (int i = 0; i < most_groups_in_flight; ++i) {
      const int inner = group + groups * i;
      k[i] = v[i] = Packed<bf16, 8>{};
      if (inner < cache_block && block * cache_block + inner <= position) {
        k[i] = load_packed<8>(keys + (row + inner) * width);
        v[i] = load_packed<8>(values + (row + inner) * width);
      }
    }
    float highest = top;
#pragma unroll
    for (int i = 0; i < most_groups_in_flight; ++i) {
      const int inner = group + groups * i, distance = position - block * cache_block - inner;
      float sum = 0;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float fade = step.rates == nullptr ? 1.0f : expf(rates[c] * static_cast<float>(distance));
        sum += q[c] * to_float(k[i].at[c]) * fade;
      }
      for (int by = lanes / 2; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
      score[i] = inner < cache_block && distance >= 0 ? sum : -__builtin_inff();
      highest = fmaxf(highest, score[i]);
    }
    const float base = highest == -__builtin_inff() ? 0.0f : highest;  // a group that has seen nothing yet
    const float decay = expf(top - base);
    total *= decay;
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] *= decay;
#pragma unroll
    for (int i = 0; i < most_groups_in_flight; ++i) {
      const float weight = expf(score[i] - base);
      total += weight;
#pragma unroll
      for (int c = 0; c < 8; ++c) out[c] += weight * to_float(v[i].at[c]);
    }
    top = highest;
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) outs[group * d + channel + i] = out[i];
  if (channel == 0) {
    tops[group] = top;
    totals[group] = total;
  }
  __syncthreads();
  if (mine < d) {
    float highest = -__builtin_inff(), sum = 0, value = 0;
    for (int g = 0; g < groups; ++g) highest = fmaxf(highest, tops[g]);
    for (int g = 0; g < groups; ++g) {
      const float weight = expf(tops[g] - highest);
      sum += weight * totals[g];
      value += weight * outs[g * d + mine];
    }
    const float gate = load<1>(step.gate + column * width + head * d + mine)[0];
    const int row = column * step_parts + part;
    store<1>(static_cast<bf16*>(step.parts) + row * width + head * d + mine,
             Floats<1>{{value / sum / (1.0f + expf(-gate))}});
    if (mine == 0)
      store<1>(step.weights_of_parts + row * step.heads + head, Floats<1>{{highest + logf(sum)}});
  }
  __syncthreads();
}

__device__ __forceinline__ void attend(const Step& step, int slot) {
  const int tasks = step.columns * step.heads * step_parts;
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += static_cast<int>(gridDim.x)) {
    const int request_head = task / step_parts;
    attend_part(step, slot, request_head / step.heads, request_head % step.heads, task % step_parts);
  }
}

// Eight channels of a request's attention, its parts joined in order.
__device__ __forceinline__ Floats<8> joined_parts(const Step& step, int column, int parts, int k) {
  const int head = k / step.head_dim, width = step.attention_width();
  const bf16* rows = static_cast<const bf16*>(step.parts) + column * step_parts * width + k;
  if (parts == 1) return load<8>(rows);
  float weights[step_parts], highest = -__builtin_inff(), sum = 0;
#pragma unroll
  for (int part = 0; part < step_parts; ++part) {
    weights[part] = -__builtin_inff();
    if (part < parts) {
      weights[part] = load<1>(step.weights_of_parts + (column * step_parts + part) * step.heads + head)[0];
    }
    highest = fmaxf(highest, weights[part]);
  }
#pragma unroll
  for (int part = 0; part < step_parts; ++part) sum += expf(weights[part] - highest);
  Floats<8> out{};
#pragma unroll
  for (int part = 0; part < step_parts; ++part) {
    if (part >= parts) continue;
    const float weight = expf(weights[part] - highest) / sum;
    const Floats<8> values = load<8>(rows + part * width);
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] += weight * values[c];
  }
  return out;
}

}  // namespace hrmcore::cuda
