// Kernels that ask a GPU whether it does what csrc/core/ptx.cuh says of it; bench/gpu/checklist.py runs them
// there, and on the emulator. Built for the tests' library, and by nvcc into one of its own; no product code
// uses them.
#include "core/cuda.cuh"

namespace hrmcore::cuda {
namespace {

struct Fragments {
  const std::uint32_t* a;  // products x 32 lanes x 4 registers
  const std::uint32_t* b;  // products x 32 x 2
  float* c;                // products x 32 x 4, added to
};

// A warp a product.
template <class T>
__global__ void __launch_bounds__(32) products(Fragments f) {
  const std::int64_t lane = blockIdx.x * 32ll + threadIdx.x;
  const Packed<std::uint32_t, 4> a = load_packed<4>(f.a + 4 * lane);
  const Packed<std::uint32_t, 2> b = load_packed<2>(f.b + 2 * lane);
  Packed<float, 4> c = load_packed<4>(f.c + 4 * lane);
  if constexpr (std::is_same_v<T, f16>) {
    mma_f16(c.at, a.at, b.at);
  } else {
    mma_bf16(c.at, a.at, b.at);
  }
  store_packed<4>(f.c + 4 * lane, c);
}

struct Numbers {
  const float* x;
  float* halves;  // of each what f16 keeps
};
__global__ void __launch_bounds__(32) halves(Numbers n) {
  const std::int64_t i = blockIdx.x * 32ll + threadIdx.x;
  store<1>(n.halves + i, Floats<1>{{rounded<f16>(load_one(n.x + i))}});
}

struct Rounds {
  std::uint32_t* state;  // of the barrier
  std::uint32_t* slots;  // one for each block
  std::uint32_t* wrong;  // one for each block: what it saw of its neighbour that was not the present round
  std::uint32_t rounds;
};

// In every round each block writes its slot and then reads its neighbour's: two barriers.
__global__ void __launch_bounds__(64) barriers(Rounds r) {
  const unsigned neighbour = (blockIdx.x + 1) % gridDim.x;
  std::uint32_t wrong = 0;
  GridBarrier barrier(r.state);
  for (std::uint32_t round = 1; round <= r.rounds; ++round) {
    if (threadIdx.x == 0) store_packed<1>(r.slots + blockIdx.x, Packed<std::uint32_t, 1>{{round}});
    barrier.arrive();
    barrier.wait();
    if (threadIdx.x == 0) wrong += load_packed<1>(r.slots + neighbour).at[0] != round;
    barrier.arrive();
    barrier.wait();
  }
  if (threadIdx.x == 0) store_packed<1>(r.wrong + blockIdx.x, Packed<std::uint32_t, 1>{{wrong}});
}

}  // namespace
}  // namespace hrmcore::cuda

#define HRMCORE_HARDWARE_ENTRY extern "C" __attribute__((visibility("default")))

HRMCORE_HARDWARE_ENTRY const char* hrmcore_hardware_products(const std::uint32_t* a, const std::uint32_t* b,
                                                             float* c, unsigned count, void* stream) {
  using namespace hrmcore::cuda;
  return launch(products<bf16>, {dim3(count), 32}, Fragments{a, b, c}, stream);
}

HRMCORE_HARDWARE_ENTRY const char* hrmcore_hardware_products_f16(const std::uint32_t* a,
                                                                 const std::uint32_t* b, float* c,
                                                                 unsigned count, void* stream) {
  using namespace hrmcore::cuda;
  return launch(products<f16>, {dim3(count), 32}, Fragments{a, b, c}, stream);
}

// 32 numbers for each of `count`.
HRMCORE_HARDWARE_ENTRY const char* hrmcore_hardware_halves(const float* x, float* halves_, unsigned count,
                                                           void* stream) {
  using namespace hrmcore::cuda;
  return launch(halves, {dim3(count), 32}, Numbers{x, halves_}, stream);
}

HRMCORE_HARDWARE_ENTRY const char* hrmcore_hardware_barriers(std::uint32_t* state, std::uint32_t* slots,
                                                             std::uint32_t* wrong, unsigned blocks,
                                                             std::uint32_t rounds, void* stream) {
  using namespace hrmcore::cuda;
  return launch(barriers, {dim3(blocks), 64, 0, true}, Rounds{state, slots, wrong, rounds}, stream);
}
