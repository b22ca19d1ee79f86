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

constexpr int eight_bytes = 32 * product_columns;  // 16 columns of 8 requests

// This lane's registers of 16 columns, for each group of 8 requests.
template <int groups>
using Columns = std::uint32_t[groups][2];

// Takes them to the tensor cores, 16 columns after 16 columns. Lanes of requests that there are not take the last
// one's, or what lies in the row of none: what they make of it nobody reads. `all_rows`: each has a row there.
template <int groups, bool all_rows>
class ActivationReader {
 public:
  __device__ __forceinline__ explicit ActivationReader(const Activations& x)
      : at_(x.offset + 8 * (all_rows ? lane_id() : 4 * min(lane_id() / 4, x.batch - 1) + lane_id() % 4)),
        stride_(32 * x.batch) {}

  static constexpr int window = 1;
  __device__ __forceinline__ void take(Columns<groups>& b, int) {
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const Packed<std::uint32_t, 2> pair =
          shared_array<Packed<std::uint32_t, 2>>(static_cast<std::size_t>(at_ + group * eight_bytes))[0];
      b[group][0] = pair.at[0];
      b[group][1] = pair.at[1];
    }
    at_ += all_rows ? groups * eight_bytes : stride_;
  }
  __device__ __forceinline__ void taken(int) {}

 private:
  int at_, stride_;  // in bytes
};

// The same from where the phase before has left them: a lane reads what it multiplies with straight into registers,
// some 16s of columns ahead, and may leave it in shared memory for tiles to come. So the products begin with the first
// that come, and what is multiplied once has no place in shared memory.
template <Packing packing, int groups, bool any_shape>
class ActivationStream {
 public:
  // 16s of columns ahead: as many as fit in the registers, of which a kernel for any shape has fewer; in bf16 whole
  // stages.
  static constexpr int window = groups > 2                 ? 2
                                : groups == 1              ? (packing == Packing::bf16 ? 8 : 12)
                                : packing != Packing::bf16 ? 6
                                : any_shape                ? 4
                                                           : 8;

  // `sixteens` 16s of columns, from `first` on, of `rows`. They are left in `kept`, too, where it keeps.
  __device__ __forceinline__ void begin(const void* rows, int first, int sixteens, const Activations& kept,
                                        bool keep) {
    next_ = static_cast<const std::byte*>(rows) + first * stride + 8 * lane_id();
    left_ = sixteens;
    kept_ = kept.offset + 8 * lane_id();
    keeps_ = keep;
#pragma unroll
    for (int place = 0; place < window; ++place) ask(place);
    advance();
  }

  // `number` is that of the 16 columns among those of some windows, a constant.
  __device__ __forceinline__ void take(Columns<groups>& b, int number) {
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      const Pair pair = ahead_[number % window][group];
      b[group][0] = pair.at[0];
      b[group][1] = pair.at[1];
      const int place = kept_ + number % window * stride + group * eight_bytes;
      if (keeps_) shared_array<Pair>(static_cast<std::size_t>(place))[0] = pair;
    }
  }
  // When they have been multiplied: the next ones into their registers. Beyond the last the weights are zeros, and what
  // the registers have will do.
  __device__ __forceinline__ void taken(int number) {
    ask(number % window);
    if (number % window < window - 1) return;
    advance();
    kept_ += window * stride;
  }

 private:
  using Pair = Packed<std::uint32_t, 2>;
  static constexpr int stride = groups * eight_bytes;

  __device__ __forceinline__ void ask(int place) {
    if (place >= left_) return;
    const std::byte* from = next_ + place * stride;
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      ahead_[place][group] =
          load_packed<2>(reinterpret_cast<const std::uint32_t*>(from + group * eight_bytes));
    }
  }
  __device__ __forceinline__ void advance() {
    next_ += window * stride;
    left_ -= window;
  }

  Pair ahead_[window][groups] = {};
  const std::byte* next_ = nullptr;  // this lane's of the first place, and how many are left from there on
  int left_ = 0, kept_ = 0;
  bool keeps_ = false;
};

}  // namespace hrmcore::cuda
