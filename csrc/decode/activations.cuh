// Activations as the tensor cores take them. A warp has those of its own columns in shared memory.
#pragma once

#include "decode/loader.cuh"

namespace hrmcore::cuda {

// How they are stored, in global memory and shared. Weights of whole numbers become f16 in fewer instructions than
// bfloat16, so activations beside them are f16: of bfloat16 they keep every bit from 2^-12 to a million, since they
// are stored divided by 16. The scales of these weights are 16 times as large (mma_layout.py).
template <Packing packing>
struct ActivationOf {
  using Element = f16;
  static constexpr float scale = 1.0f / 16;
};
template <>
struct ActivationOf<Packing::bf16> {
  using Element = bf16;
  static constexpr float scale = 1;
};
template <Packing packing>
using Activation = typename ActivationOf<packing>::Element;
template <Packing packing>
using ActivationPiece = Packed<Activation<packing>, 8>;  // 16 bytes

template <Packing packing>
__device__ __forceinline__ Activation<packing> to_activation(float x) {
  Activation<packing> element;
  assign(element, x * ActivationOf<packing>::scale);
  return element;
}
// x as a product will read it.
template <Packing packing>
__device__ __forceinline__ float read_back(float x) {
  return to_float(to_activation<packing>(x)) * (1 / ActivationOf<packing>::scale);
}
template <Packing packing>
__device__ __forceinline__ void store_activation(void* row, int at, float x) {
  store_packed<1>(static_cast<Activation<packing>*>(row) + at,
                  Packed<Activation<packing>, 1>{{to_activation<packing>(x)}});
}

// Two numbers, each as the sum of two bfloat16: 16 bits of it.
__device__ __forceinline__ float half_of(bf16x2 pair, int which) {
  return __uint_as_float(which == 0 ? pair << 16 : pair & 0xffff0000u);
}
__device__ __forceinline__ void split_pair(float x, float y, bf16x2& first, bf16x2& second) {
  first = to_bf16x2(x, y);
  second = to_bf16x2(x - half_of(first, 0), y - half_of(first, 1));
}

// A warp's share of the activations, or as much of it as there is room for: (16 columns, rows, 16), as in global
// memory.
struct Activations {
  int offset, batch;  // offset in shared memory, in bytes

  template <Packing packing>
  __device__ __forceinline__ SharedArray<ActivationPiece<packing>> pieces() const {
    return shared_array<ActivationPiece<packing>>(static_cast<std::size_t>(offset));
  }
};

// This lane's registers of 16 columns, for each group of 8 requests.
template <int groups>
using Columns = std::uint32_t[groups][2];

// Takes them to the tensor cores, 16 columns after 16 columns. Lanes of requests that there are not take the last
// one's, or what lies in the row of none: what they make of it nobody reads.
template <int groups>
class ActivationReader {
 public:
  __device__ __forceinline__ explicit ActivationReader(const Activations& x)
      : at_(x.offset + 8 * (groups > 1 ? lane_id() : 4 * min(lane_id() / 4, x.batch - 1) + lane_id() % 4)),
        stride_(32 * x.batch) {}

  __device__ __forceinline__ void take(Columns<groups>& b) {
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const Packed<std::uint32_t, 2> pair =
          shared_array<Packed<std::uint32_t, 2>>(static_cast<std::size_t>(at_ + group * group_bytes))[0];
      b[group][0] = pair.at[0];
      b[group][1] = pair.at[1];
    }
    at_ += groups > 1 ? groups * group_bytes : stride_;
  }

 private:
  static constexpr int group_bytes = 32 * product_columns;
  int at_, stride_;  // in bytes
};

}  // namespace hrmcore::cuda
