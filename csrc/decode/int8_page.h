// A page of an int8 cache: 64 tokens of one slot and head, in one piece of memory.
//
//   keys    [64][d]   bytes, q + 128
//   values  [64][d]   bytes, q + 128
//   scales  [64][16]  bytes of a token: up to four bfloat16, one for each 32 channels of the key; the value's, float32;
//                     four of no use
//
// x = q * scale, q = round(x / scale) in [-127, 127], scale = max |x| / 127, of a key rounded to bfloat16 first: the
// numbers of the CPU engine's int8 cache (kv/paged_attention.h).
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace hrmcore {

struct Int8Page {
  static constexpr int tokens = 64, scale_channels = 32, scale_bytes = 16, value_scale = 8;
  int head_dim;

  HRMCORE_HOST_DEVICE constexpr int groups() const {
    return head_dim < scale_channels ? 1 : head_dim / scale_channels;
  }
  HRMCORE_HOST_DEVICE constexpr int values() const { return tokens * head_dim; }  // where they begin
  HRMCORE_HOST_DEVICE constexpr int scales() const { return 2 * tokens * head_dim; }
  HRMCORE_HOST_DEVICE constexpr int bytes() const { return scales() + tokens * scale_bytes; }

  // The head_dims that it is made for.
  static constexpr bool takes(std::int64_t head_dim) {
    return head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 128;
  }
};

}  // namespace hrmcore
