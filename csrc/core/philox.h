// Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), on either processor: a
// function of counter and key alone. In products of 32 bits, which every compiler has.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace hrmcore {

struct PhiloxWords {
  std::uint64_t at[4];
};

// The upper 64 bits of a product.
HRMCORE_HOST_DEVICE inline std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t low = 0xFFFFFFFFu, a0 = a & low, a1 = a >> 32, b0 = b & low, b1 = b >> 32;
  const std::uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & low);
  return a1 * b1 + (middle >> 32) + (other >> 32);
}

HRMCORE_HOST_DEVICE inline PhiloxWords philox4x64(PhiloxWords counter, std::uint64_t key0,
                                                  std::uint64_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2E7470EE14C6C93u, b = 0xCA5A826395121157u;
    counter = {{multiply_high(b, counter.at[2]) ^ counter.at[1] ^ key0, b * counter.at[2],
                multiply_high(a, counter.at[0]) ^ counter.at[3] ^ key1, a * counter.at[0]}};
    key0 += 0x9E3779B97F4A7C15u;
    key1 += 0xBB67AE8584CAA73Bu;
  }
  return counter;
}

// In [0, 1): what a request draws its n-th token by, n from 0.
HRMCORE_HOST_DEVICE inline double uniform_of_draw(std::uint64_t seed, std::uint64_t n) {
  return static_cast<double>(philox4x64({{n + 1, 0, 0, 0}}, seed, 0).at[0] >> 11) * 0x1p-53;
}

}  // namespace hrmcore
