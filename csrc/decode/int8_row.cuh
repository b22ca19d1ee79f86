// The new token's row of an int8 cache: rounded by the warp that sees it, appended, and put into its stage.
#pragma once

#include "decode/loader.cuh"

namespace hrmcore::cuda {

template <class P>
__device__ __forceinline__ Int8Stage int8_stage(const P& params, int slot) {
  return {slot, params.head_dim, params.head_shift - 4};
}

// The new token's own row of an int8 cache: what gqkv has left of it, rounded.
struct OwnInt8Row {
  Packed<std::uint32_t, 2> key, value;  // 8 channels in each of the first d / 8 lanes
  float key_scale, value_scale;         // of these channels, of all

  // All lanes of the warp; those beyond the channels have zeros.
  template <class P>
  __device__ __forceinline__ void read(const P& params, int request, int head) {
    const int channel = 8 * lane_id(), width = params.attention_width();
    const bool there = channel < params.head_dim;
    const float* keys = params.fresh + request * width + head * params.head_dim + channel;
    const Floats<8> k = there ? load<8>(keys) : Floats<8>{},
                    v = there ? load<8>(keys + max_batch * width) : Floats<8>{};
    int largest_key = 0, largest_value = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      largest_key = max(largest_key, magnitude(k[i]));
      largest_value = max(largest_value, magnitude(v[i]));
    }
#pragma unroll
    for (int by = 1; by < 16; by *= 2) {
      if (by < 4) largest_key = max(largest_key, __shfl_xor_sync(0xffffffffu, largest_key, by));
      largest_value = max(largest_value, __shfl_xor_sync(0xffffffffu, largest_value, by));
    }
    const Int8Scale of_key(largest_key, true), of_value(largest_value, false);
    key_scale = of_key.scale;
    value_scale = of_value.scale;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float k4[4] = {k[4 * i], k[4 * i + 1], k[4 * i + 2], k[4 * i + 3]},
                  v4[4] = {v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
      key.at[i] = to_bytes(k4, of_key.inverse);
      value.at[i] = to_bytes(v4, of_value.inverse);
    }
  }

  // Appends it to its page, of which it is row `inner`.
  template <class P>
  __device__ __forceinline__ void append(const P& params, std::byte* at, int inner) const {
    const Int8Page page = params.page();
    if (8 * lane_id() >= page.head_dim) return;
    std::byte* row = at + inner * page.head_dim + 8 * lane_id();
    store_packed<2>(reinterpret_cast<std::uint32_t*>(row), key);
    store_packed<2>(reinterpret_cast<std::uint32_t*>(row + page.values()), value);
    std::byte* scales = at + page.scales() + inner * Int8Page::scale_bytes;
    if (lane_id() % 4 == 0) {
      store<1>(reinterpret_cast<bf16*>(scales) + lane_id() / 4, Floats<1>{{key_scale}});
    }
    if (lane_id() == 0) {
      store<1>(reinterpret_cast<float*>(scales + Int8Page::value_scale), Floats<1>{{value_scale}});
    }
  }

  template <class P>
  __device__ __forceinline__ void put(const P& params, int slot, int inner) const {
    const Int8Stage stage = int8_stage(params, slot);
    const auto place = [](int at) {
      return shared_array<Packed<std::uint32_t, 2>>(static_cast<std::size_t>(at));
    };
    const int piece = lane_id() / 2, half = 8 * (lane_id() % 2);
    if (8 * lane_id() < params.head_dim) {
      place(stage.keys(inner, piece) + half)[0] = key;
      place(stage.values(inner, piece) + half)[0] = value;
      const auto scales = static_cast<std::size_t>(stage.scales(inner));
      if (lane_id() % 4 == 0) shared_array<bf16>(scales)[lane_id() / 4] = to_bf16(key_scale);
      if (lane_id() == 0) shared_array<float>(scales + Int8Page::value_scale)[0] = value_scale;
    }
    __syncwarp();
  }
};

}  // namespace hrmcore::cuda
