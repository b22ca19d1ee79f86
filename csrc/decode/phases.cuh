// The phases of a decode step, each for every block of the grid. Between two of them all of the grid must
// have passed a barrier.
#pragma once

#include "decode/attention.cuh"

namespace hrmcore::cuda {

__device__ __forceinline__ SharedArray<float> squares(int norm) {
  return shared_array<float>(squares_offset) + norm * decode_warps * max_batch;
}

__device__ __forceinline__ void put_squares(int norm, int request, float square) {
  square = warp_sum(square);
  if (lane_id() == 0) squares(norm)[warp_id() * max_batch + request] = square;
}

// 1 / rms of a request's row, once the block has passed a barrier after put_squares.
__device__ __forceinline__ float inverse_rms(const DecodeParams& params, int norm, int request) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < decode_warps; ++warp) sum += squares(norm)[warp * max_batch + request];
  return 1.0f / sqrtf(sum / static_cast<float>(params.width) + params.eps);
}

// Fills the activations from source(request, k), eight elements of its row from k on, and their squares.
template <bool normed, class Source>
__device__ __forceinline__ void load_activations(const DecodeParams& params, int depth, int padded,
                                                 const Source& source) {
  const Activations x = activations(params);
  for (int request = 0; request < params.batch; ++request) {
    float square = 0;
    for (int k = 8 * static_cast<int>(threadIdx.x); k < padded; k += 8 * decode_threads) {
      Packed<bf16, 8> eight{};
      if (k < depth) {
        const Floats<8> values = source(request, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          eight.at[i] = to_bf16(values[i]);
          square += values[i] * values[i];
        }
      }
      x.put(request, k, eight);
    }
    if constexpr (normed) put_squares(0, request, square);
  }
  __syncthreads();
}

__device__ __forceinline__ Floats<8> stream_of_first_visit(const DecodeParams& params, int request, int k) {
  const int token = clamped(load_one(params.tokens + request), params.vocabulary);
  Floats<8> z_h = load<8>(static_cast<const bf16*>(params.embedding) +
                          static_cast<std::int64_t>(token) * params.width + k);
#pragma unroll
  for (int i = 0; i < 8; ++i) z_h[i] *= params.embedding_scale;
  return z_h;
}

// The stream that enters a visit: the state that the visit before left, its norm taken now (from the bfloat16
// copy, as every norm), plus the other one. Each block computes all of it; one writes it down.
__device__ __forceinline__ void enter_visit(const DecodeParams& params, int visit, int padded) {
  const bool first = visit == 0, h_before = !first && params.schedule.is_h(visit - 1);
  const float* before = params.streams[(visit + 1) % 2];
  float *after = params.streams[visit % 2], *changed = params.states[h_before],
        *kept = params.states[!h_before];
  if (!first) {
    for (int request = 0; request < params.batch; ++request) {
      float square = 0;
      for (int k = 8 * static_cast<int>(threadIdx.x); k < params.width; k += 8 * decode_threads) {
        const Floats<8> u = load<8>(static_cast<const bf16*>(params.x) + request * params.width + k);
#pragma unroll
        for (int i = 0; i < 8; ++i) square += u[i] * u[i];
      }
      put_squares(1, request, square);
    }
    __syncthreads();
  }
  load_activations<true>(params, params.width, padded, [&](int request, int k) {
    const int at = request * params.width + k;
    Floats<8> state, other;
    if (first) {
      state = load<8>(params.z_init + k);
      other = stream_of_first_visit(params, request, k);
    } else {
      const float r = inverse_rms(params, 1, request);
      state = load<8>(before + at);
      other = load<8>(kept + at);
#pragma unroll
      for (int i = 0; i < 8; ++i) state[i] *= r;
    }
    Floats<8> u;
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = state[i] + other[i];
    if (k / 8 % static_cast<int>(gridDim.x) == static_cast<int>(blockIdx.x)) {
      store<8>(after + at, u);
      store<8>(changed + at, state);
      if (first) store<8>(kept + at, other);
    }
    return u;
  });
}

// The rows of bfloat16 that a phase before has left.
template <bool normed>
__device__ __forceinline__ void load_rows(const DecodeParams& params, const void* rows, int depth,
                                          int padded) {
  load_activations<normed>(params, depth, padded, [&](int request, int k) {
    return load<8>(static_cast<const bf16*>(rows) + request * depth + k);
  });
}

// A pair of outputs i and i + d / 2 of one head, of one of gate, q, k, v.
__device__ __forceinline__ void finish_gqkv(const DecodeParams& params, int slot, int tile, int row,
                                            int request, float low, float high) {
  const int d = params.head_dim, head_tiles = d / 16, width = params.attention_width();
  const int i = tile % head_tiles * 8 + row, head = tile / head_tiles % params.heads,
            kind = tile / head_tiles / params.heads;
  const int channel = head * d + i, partner = channel + d / 2;
  if (kind == 0) {
    store<1>(params.gate + request * width + channel, Floats<1>{{low}});
    store<1>(params.gate + request * width + partner, Floats<1>{{high}});
    return;
  }
  if (kind < 3) {
    const float* angles = params.rope + static_cast<std::int64_t>(positions()[request]) * d + i;
    const float cosine = load<1>(angles)[0], sine = load<1>(angles + d / 2)[0], before = low;
    low = low * cosine - high * sine;
    high = high * cosine + before * sine;
  }
  if (kind == 1) {
    store<1>(params.q + request * width + channel, Floats<1>{{low}});
    store<1>(params.q + request * width + partner, Floats<1>{{high}});
    return;
  }
  bf16* cached = cache_of(params, slot, kind - 2) + slot_mapping()[request] * width;
  store<1>(cached + channel, Floats<1>{{low}});
  store<1>(cached + partner, Floats<1>{{high}});
}

// The stream's row r of a request grows by `more`; what the next GEMM reads is written beside it.
__device__ __forceinline__ void add_to_stream(const DecodeParams& params, int visit, int request, int r,
                                              float more) {
  if (r >= params.width) return;
  float* u = params.streams[visit % 2] + request * params.width + r;
  const float sum = load<1>(u)[0] + more;
  store<1>(u, Floats<1>{{sum}});
  store<1>(static_cast<bf16*>(params.x) + request * params.width + r, Floats<1>{{sum}});
}

// One phase of a layer. The stream has begun on params.matrix(at) already, unless it is the attention.
template <Packing packing, int stages>
__device__ __forceinline__ void run_phase(const DecodeParams& params, WeightStream<packing, stages>& stream,
                                          const SchedulePoint& at) {
  const bool multiplies = at.phase != Phase::attention, enters = at.phase == Phase::gqkv && at.layer == 0;
  if (multiplies && !enters && static_cast<int>(blockIdx.x) >= stream.matrix().tiles) return;
  const int padded = stream.depth(), mine = static_cast<int>(threadIdx.x) % max_batch;
  switch (at.phase) {
    case Phase::gqkv: {
      if (enters) {
        enter_visit(params, at.visit, padded);
      } else {
        load_rows<true>(params, params.x, params.width, padded);
      }
      const float r = mine < params.batch ? inverse_rms(params, 0, mine) : 0.0f;
      multiply(params, stream, [&](int tile, int row, int request, float low, float high) {
        finish_gqkv(params, at.slot, tile, row, request, low * r, high * r);
      });
      break;
    }
    case Phase::attention:
      attend(params, at.slot);
      break;
    case Phase::o: {
      load_activations<false>(params, params.attention_width(), padded, [&](int request, int k) {
        return joined_splits(params, request, kv_splits_of(params, positions()[request]).count, k);
      });
      multiply(params, stream, [&](int tile, int row, int request, float low, float high) {
        add_to_stream(params, at.visit, request, tile * tile_rows + row, low);
        add_to_stream(params, at.visit, request, tile * tile_rows + row + 8, high);
      });
      break;
    }
    case Phase::gate_up: {
      load_rows<true>(params, params.x, params.width, padded);
      const float r = mine < params.batch ? inverse_rms(params, 0, mine) : 0.0f;
      multiply(params, stream, [&](int tile, int row, int request, float low, float high) {
        const float a = low * r, b = high * r;
        bf16* hidden = static_cast<bf16*>(params.hidden) + request * params.ffn + tile * 8 + row;
        store<1>(hidden, Floats<1>{{a / (1.0f + expf(-a)) * b}});
      });
      break;
    }
    case Phase::down: {
      load_rows<false>(params, params.hidden, params.ffn, padded);
      multiply(params, stream, [&](int tile, int row, int request, float low, float high) {
        add_to_stream(params, at.visit, request, tile * tile_rows + row, low);
        add_to_stream(params, at.visit, request, tile * tile_rows + row + 8, high);
      });
      break;
    }
    case Phase::head:
      break;
  }
}

template <Packing packing, int stages>
__device__ __forceinline__ void run_head(const DecodeParams& params, WeightStream<packing, stages>& stream) {
  const int mine = static_cast<int>(threadIdx.x) % max_batch;
  if (static_cast<int>(blockIdx.x) >= stream.matrix().tiles) return;
  load_rows<true>(params, params.x, params.width, stream.depth());
  const float r = mine < params.batch ? inverse_rms(params, 0, mine) : 0.0f;
  multiply(params, stream, [&](int tile, int row, int request, float low, float high) {
    const int token = tile * tile_rows + row;
    float* logits = params.logits + static_cast<std::int64_t>(request) * params.vocabulary + token;
    if (token < params.vocabulary) store<1>(logits, Floats<1>{{low * r}});
    if (token + 8 < params.vocabulary) store<1>(logits + 8, Floats<1>{{high * r}});
  });
}

}  // namespace hrmcore::cuda
