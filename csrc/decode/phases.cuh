// The phases of a step, each for every block of the grid. Between two of them all of the grid must have
// passed a barrier.
#pragma once

#include "decode/attention.cuh"

namespace hrmcore::cuda {

__device__ __forceinline__ SharedArray<float> squares(int norm) {
  return shared_array<float>(squares_offset) + norm * step_warps * most_columns;
}

__device__ __forceinline__ void put_squares(int norm, int column, float square) {
  square = warp_sum(square);
  if (step_lane() == 0) squares(norm)[step_warp() * most_columns + column] = square;
}

// 1 / rms of a request's row, once the block has passed a barrier after put_squares.
__device__ __forceinline__ float inverse_rms(const Step& step, int norm, int column) {
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < step_warps; ++warp) sum += squares(norm)[warp * most_columns + column];
  return 1.0f / sqrtf(sum / static_cast<float>(step.width) + step.eps);
}

// Fills the activations from source(request, k), eight elements of its row from k on, and their squares.
template <bool normed, class Source>
__device__ __forceinline__ void load_activations(const Step& step, int depth, int padded,
                                                 const Source& source) {
  const Activations x = activations(step);
  for (int column = 0; column < step.columns; ++column) {
    float square = 0;
    for (int k = 8 * static_cast<int>(threadIdx.x); k < padded; k += 8 * step_threads) {
      Packed<bf16, 8> eight{};
      if (k < depth) {
        const Floats<8> values = source(column, k);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          eight.at[i] = to_bf16(values[i]);
          square += values[i] * values[i];
        }
      }
      x.put(column, k, eight);
    }
    if constexpr (normed) put_squares(0, column, square);
  }
  __syncthreads();
}

__device__ __forceinline__ Floats<8> stream_of_first_visit(const Step& step, int column, int k) {
  const int token = clamped(load_one(step.tokens + column), step.vocabulary);
  Floats<8> slow =
      load<8>(static_cast<const bf16*>(step.embedding) + static_cast<std::int64_t>(token) * step.width + k);
#pragma unroll
  for (int i = 0; i < 8; ++i) slow[i] *= step.embedding_scale;
  return slow;
}

// The stream that enters a visit: the state that the visit before left, its norm taken now (from the bfloat16
// copy, as every norm), plus the other one. Each block computes all of it; one writes it down.
__device__ __forceinline__ void enter_visit(const Step& step, int visit, int padded) {
  const bool first = visit == 0, slow_before = !first && step.is_slow(visit - 1);
  const float* before = step.streams[(visit + 1) % 2];
  float *after = step.streams[visit % 2], *changed = step.states[slow_before],
        *kept = step.states[!slow_before];
  if (!first) {
    for (int column = 0; column < step.columns; ++column) {
      float square = 0;
      for (int k = 8 * static_cast<int>(threadIdx.x); k < step.width; k += 8 * step_threads) {
        const Floats<8> u = load<8>(static_cast<const bf16*>(step.x) + column * step.width + k);
#pragma unroll
        for (int i = 0; i < 8; ++i) square += u[i] * u[i];
      }
      put_squares(1, column, square);
    }
    __syncthreads();
  }
  load_activations<true>(step, step.width, padded, [&](int column, int k) {
    const int at = column * step.width + k;
    Floats<8> state, other;
    if (first) {
      state = load<8>(step.z_init + k);
      other = stream_of_first_visit(step, column, k);
    } else {
      const float r = inverse_rms(step, 1, column);
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
__device__ __forceinline__ void load_rows(const Step& step, const void* rows, int depth, int padded) {
  load_activations<normed>(step, depth, padded, [&](int column, int k) {
    return load<8>(static_cast<const bf16*>(rows) + column * depth + k);
  });
}

// A pair of outputs i and i + d / 2 of one head, of one of gate, q, k, v.
__device__ __forceinline__ void finish_gqkv(const Step& step, int slot, int tile, int row, int column,
                                            float low, float high) {
  const int d = step.head_dim, head_tiles = d / 16, width = step.attention_width();
  const int i = tile % head_tiles * 8 + row, head = tile / head_tiles % step.heads,
            kind = tile / head_tiles / step.heads;
  const int channel = head * d + i, partner = channel + d / 2;
  if (kind == 0) {
    store<1>(step.gate + column * width + channel, Floats<1>{{low}});
    store<1>(step.gate + column * width + partner, Floats<1>{{high}});
    return;
  }
  if (kind < 3) {
    const float* angles = step.rope + static_cast<std::int64_t>(positions()[column]) * d + i;
    const float cosine = load<1>(angles)[0], sine = load<1>(angles + d / 2)[0], before = low;
    low = low * cosine - high * sine;
    high = high * cosine + before * sine;
  }
  if (kind == 1) {
    store<1>(step.q + column * width + channel, Floats<1>{{low}});
    store<1>(step.q + column * width + partner, Floats<1>{{high}});
    return;
  }
  bf16* cached = cache_of(step, slot, kind - 2) + new_rows()[column] * width;
  store<1>(cached + channel, Floats<1>{{low}});
  store<1>(cached + partner, Floats<1>{{high}});
}

// The stream's row r of a request grows by `more`; what the next product reads is written beside it.
__device__ __forceinline__ void add_to_stream(const Step& step, int visit, int column, int r, float more) {
  if (r >= step.width) return;
  float* u = step.streams[visit % 2] + column * step.width + r;
  const float sum = load<1>(u)[0] + more;
  store<1>(u, Floats<1>{{sum}});
  store<1>(static_cast<bf16*>(step.x) + column * step.width + r, Floats<1>{{sum}});
}

// One phase of a layer. The stream has begun on step.matrix(at) already, unless
// it is the attention.
template <Packing packing, int stages>
__device__ __forceinline__ void run_phase(const Step& step, WeightStream<packing, stages>& stream,
                                          const Place& at) {
  const bool product = at.phase != Phase::attention, enters = at.phase == Phase::gqkv && at.layer == 0;
  if (product && !enters && static_cast<int>(blockIdx.x) >= stream.matrix().tiles) return;
  const int padded = stream.depth(), column = static_cast<int>(threadIdx.x) % most_columns;
  switch (at.phase) {
    case Phase::gqkv: {
      if (enters) {
        enter_visit(step, at.visit, padded);
      } else {
        load_rows<true>(step, step.x, step.width, padded);
      }
      const float r = column < step.columns ? inverse_rms(step, 0, column) : 0.0f;
      multiply(step, stream, [&](int tile, int row, int request, float low, float high) {
        finish_gqkv(step, at.slot, tile, row, request, low * r, high * r);
      });
      break;
    }
    case Phase::attention:
      attend(step, at.slot);
      break;
    case Phase::o: {
      load_activations<false>(step, step.attention_width(), padded, [&](int request, int k) {
        return joined_parts(step, request, parts_of(step, positions()[request]).count, k);
      });
      multiply(step, stream, [&](int tile, int row, int request, float low, float high) {
        add_to_stream(step, at.visit, request, tile * step_tile_rows + row, low);
        add_to_stream(step, at.visit, request, tile * step_tile_rows + row + 8, high);
      });
      break;
    }
    case Phase::gate_up: {
      load_rows<true>(step, step.x, step.width, padded);
      const float r = column < step.columns ? inverse_rms(step, 0, column) : 0.0f;
      multiply(step, stream, [&](int tile, int row, int request, float low, float high) {
        const float a = low * r, b = high * r;
        bf16* hidden = static_cast<bf16*>(step.hidden) + request * step.ffn + tile * 8 + row;
        store<1>(hidden, Floats<1>{{a / (1.0f + expf(-a)) * b}});
      });
      break;
    }
    case Phase::down: {
      load_rows<false>(step, step.hidden, step.ffn, padded);
      multiply(step, stream, [&](int tile, int row, int request, float low, float high) {
        add_to_stream(step, at.visit, request, tile * step_tile_rows + row, low);
        add_to_stream(step, at.visit, request, tile * step_tile_rows + row + 8, high);
      });
      break;
    }
    case Phase::head:
      break;
  }
}

template <Packing packing, int stages>
__device__ __forceinline__ void run_head(const Step& step, WeightStream<packing, stages>& stream) {
  const int column = static_cast<int>(threadIdx.x) % most_columns;
  if (static_cast<int>(blockIdx.x) >= stream.matrix().tiles) return;
  load_rows<true>(step, step.x, step.width, stream.depth());
  const float r = column < step.columns ? inverse_rms(step, 0, column) : 0.0f;
  multiply(step, stream, [&](int tile, int row, int request, float low, float high) {
    const int token = tile * step_tile_rows + row;
    float* logits = step.logits + static_cast<std::int64_t>(request) * step.vocabulary + token;
    if (token < step.vocabulary) store<1>(logits, Floats<1>{{low * r}});
    if (token + 8 < step.vocabulary) store<1>(logits + 8, Floats<1>{{high * r}});
  });
}

}  // namespace hrmcore::cuda
