// Kernels that are wrong on purpose, each in one way, and a few that are right; tests/test_emulator.py runs
// them by name and expects the emulator to say what is wrong. Built only into the tests' library.
#include <cstring>

#include "core/cuda.cuh"

namespace hrmcore::cuda {
namespace {

constexpr int threads = 64;
constexpr std::size_t shared_bytes = threads * sizeof(float);

struct Memory {
  float* numbers;  // at least a thousand, zero at first
  unsigned long long* count;
};

int index() { return static_cast<int>(threadIdx.x); }
void put(float* p, float x) { store<1>(p, Floats<1>{{x}}); }

// ---- right

void sum_of_block(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  shared[index()] = static_cast<float>(index() + 1);
  __syncthreads();
  float sum = shared[(index() + 32) % threads] + shared[index()];
  sum = warp_sum(sum);
  if (index() == 0) put(m.numbers, sum);
}

void pass_again(GridBarrier& barrier) {
  barrier.arrive();
  barrier.wait();
}

void pass_grid_barrier() {
  GridBarrier barrier(nullptr);
  barrier.arrive();
  barrier.wait();
}

void passed_through_the_grid(Memory m) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (index() == 0) put(m.numbers + block, static_cast<float>(block + 1));
  pass_grid_barrier();
  if (index() == 0) put(m.numbers + blocks + block, load<1>(m.numbers + (block + 1) % blocks)[0]);
}

// What a block brings between arriving and waiting depends on nobody, and what it writes nobody reads before the
// next barrier.
void works_between_arriving_and_waiting(Memory m) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const SharedArray<float> shared = shared_array<float>(0);
  GridBarrier barrier(nullptr);
  float own = 0;
  for (int round = 0; round < 3; ++round) {
    if (index() == 0) put(m.numbers + block, static_cast<float>(round * 100 + block));
    barrier.arrive();
    if (index() == 0) put(m.numbers + 2 * blocks + block, ++own);
    shared[index()] = own;
    __syncwarp();
    own += shared[index() ^ 1] - shared[index() ^ 1];
    barrier.wait();
    if (index() == 0) put(m.numbers + blocks + block, load<1>(m.numbers + (block + 1) % blocks)[0]);
    barrier.arrive();
    __syncthreads();
    barrier.wait();
    if (index() == 1) own = load<1>(m.numbers + 2 * blocks + (block + 1) % blocks)[0];
    pass_again(barrier);
  }
}

void order_of_blocks(Memory m) {
  if (index() == 0) put(m.numbers + atomicAdd(m.count, 1), static_cast<float>(blockIdx.x));
}

void votes(Memory m) {
  const unsigned even = __ballot_sync(0xffffffffu, index() % 2 == 0);
  const float neighbour = __shfl_sync(0xffffffffu, static_cast<float>(index()), index() + 1);
  put(m.numbers + index(), even == 0x55555555u ? neighbour : -1.0f);
}

void copied_and_awaited(Memory m) {
  if (index() >= 8) return;
  const SharedArray<float> shared = shared_array<float>(0) + 4 * index();
  copy_async(shared.data, m.numbers + 4 * index(), index() == 7 ? 8 : 16);
  commit_copies();
  const float before = shared[3];
  wait_for_copies<0>();
  put(m.numbers + 100 + index(), before != before ? shared[3] : -1.0f);  // poison until the wait
}

// ---- wrong

void shared_out_of_bounds(Memory) { shared_array<float>(0)[index() + 1] = 0; }

void shared_misaligned(Memory) { shared_array<float>(2)[index() % 32] = 0; }

void shared_not_written(Memory m) { put(m.numbers + index(), shared_array<float>(0)[index()]); }

void missing_barrier(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  shared[index()] = 1;
  put(m.numbers + index(), shared[threads - 1 - index()]);
}

void missing_second_barrier(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  shared[index()] = 1;
  __syncthreads();
  put(m.numbers + index(), shared[threads - 1 - index()]);
  shared[index()] = 2;
}

void missing_warp_barrier(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  shared[index()] = 1;
  put(m.numbers + index(), shared[index() ^ 1]);
}

void warp_barrier_for_a_block(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  shared[index()] = 1;
  __syncwarp();
  put(m.numbers + index(), shared[index() ^ 32]);
}

void shuffle_is_no_barrier(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  shared[index()] = 1;
  const float sum = warp_sum(1.0f);
  put(m.numbers + index(), shared[index() ^ 1] * sum);
}

void blocks_write_one_place(Memory m) {
  if (index() == 0) put(m.numbers, static_cast<float>(blockIdx.x));
}

void block_reads_its_neighbour(Memory m) {
  if (index() != 0) return;
  put(m.numbers + blockIdx.x, 1);
  put(m.numbers + 100 + blockIdx.x, load<1>(m.numbers + (blockIdx.x + 1) % gridDim.x)[0]);
}

void skipped_barrier(Memory) {
  if (index() == 5) return;
  __syncthreads();
}

void divergent_barrier(Memory) {
  if (index() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void deadlock(Memory) {
  if (index() % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

void divergent_shuffle(Memory m) {
  float x = 1;
  if (index() % 32 < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  } else {
    x = __shfl_xor_sync(0xffffffffu, x, 2);
  }
  put(m.numbers + index(), x);
}

void shuffle_without_the_caller(Memory m) { put(m.numbers + index(), __shfl_xor_sync(0x0000ffffu, 1.0f, 1)); }

void shuffle_from_outside_the_mask(Memory m) {
  if (index() % 32 < 16) put(m.numbers + index(), __shfl_xor_sync(0x0000ffffu, 1.0f, 16));
}

void shuffle_with_a_lane_that_left(Memory m) {
  if (index() == 3) return;
  put(m.numbers + index(), __shfl_xor_sync(0xffffffffu, 1.0f, 1));
}

void grid_barrier_without_cooperation(Memory) { pass_grid_barrier(); }

void grid_barrier_skipped(Memory) {
  if (blockIdx.x != 1) pass_grid_barrier();
}

// Others read it as soon as they have waited.
void write_after_arriving(Memory m) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  GridBarrier barrier(nullptr);
  barrier.arrive();
  if (index() == 0) put(m.numbers + block, 1.0f);
  barrier.wait();
  if (index() == 0) put(m.numbers + blocks + block, load<1>(m.numbers + (block + 1) % blocks)[0]);
}

// Others may not have written it yet.
void read_before_waiting(Memory m) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  GridBarrier barrier(nullptr);
  if (index() == 0) put(m.numbers + block, 1.0f);
  barrier.arrive();
  if (index() == 0) put(m.numbers + blocks + block, load<1>(m.numbers + (block + 1) % blocks)[0]);
  barrier.wait();
}

void state_read_after_arriving(Memory) {
  GridBarrier(nullptr).arrive();
  GridBarrier(nullptr).wait();
}

void waits_without_arriving(Memory) { GridBarrier(nullptr).wait(); }

void arrives_twice(Memory) {
  const GridBarrier barrier(nullptr);
  barrier.arrive();
  barrier.arrive();
}

void leaves_while_others_wait(Memory) {
  GridBarrier barrier(nullptr);
  if (blockIdx.x == 0) return;
  barrier.arrive();
  barrier.wait();
}

void copy_nobody_awaits(Memory m) {
  if (index() == 0) copy_async(shared_array<float>(0).data, m.numbers, 16);
}

void copy_read_by_another(Memory m) {
  const SharedArray<float> shared = shared_array<float>(0);
  if (index() == 0) copy_async(shared.data, m.numbers, 16);
  commit_copies();
  __syncthreads();
  if (index() == 40) put(m.numbers + 100, shared[0]);  // thread 0 waits only afterwards
  wait_for_copies<0>();
}

void too_much_stack(Memory m) {
  volatile char large[64 << 10];
  if (index() == 1) {
    for (volatile char& c : large) c = 1;
    put(m.numbers, large[100]);
  }
}

struct Planted {
  const char* name;
  void (*kernel)(Memory);
};

#define PLANTED(kernel) {#kernel, kernel}
constexpr Planted planted[] = {PLANTED(sum_of_block),
                               PLANTED(passed_through_the_grid),
                               PLANTED(order_of_blocks),
                               PLANTED(votes),
                               PLANTED(copied_and_awaited),
                               PLANTED(shared_out_of_bounds),
                               PLANTED(shared_misaligned),
                               PLANTED(shared_not_written),
                               PLANTED(missing_barrier),
                               PLANTED(missing_second_barrier),
                               PLANTED(missing_warp_barrier),
                               PLANTED(warp_barrier_for_a_block),
                               PLANTED(shuffle_is_no_barrier),
                               PLANTED(blocks_write_one_place),
                               PLANTED(block_reads_its_neighbour),
                               PLANTED(skipped_barrier),
                               PLANTED(divergent_barrier),
                               PLANTED(deadlock),
                               PLANTED(divergent_shuffle),
                               PLANTED(shuffle_without_the_caller),
                               PLANTED(shuffle_from_outside_the_mask),
                               PLANTED(shuffle_with_a_lane_that_left),
                               PLANTED(grid_barrier_without_cooperation),
                               PLANTED(grid_barrier_skipped),
                               PLANTED(works_between_arriving_and_waiting),
                               PLANTED(write_after_arriving),
                               PLANTED(read_before_waiting),
                               PLANTED(state_read_after_arriving),
                               PLANTED(waits_without_arriving),
                               PLANTED(arrives_twice),
                               PLANTED(leaves_while_others_wait),
                               PLANTED(copy_nobody_awaits),
                               PLANTED(copy_read_by_another),
                               PLANTED(too_much_stack)};
#undef PLANTED

struct Fragments {
  const std::uint32_t *a, *b;  // lane by lane: 4 and 2 registers
  float* c;                    // 4 registers
};

void one_mma(Fragments f) {
  const int lane = index();
  bf16x2 a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = f.a[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = f.b[2 * lane + i];
  for (int i = 0; i < 4; ++i) c[i] = f.c[4 * lane + i];
  mma_bf16(c, a, b);
  for (int i = 0; i < 4; ++i) f.c[4 * lane + i] = c[i];
}

struct Matrices {
  const std::uint16_t* elements;  // four matrices of 8 x 8
  std::uint32_t* registers;       // lane by lane: 4 as they are, 4 transposed
};

void one_ldmatrix(Matrices m) {
  const int lane = index();
  const SharedArray<bf16> shared = shared_array<bf16>(0);
  for (int i = 0; i < 8; ++i) shared[8 * lane + i] = bf16{m.elements[8 * lane + i]};
  __syncwarp();
  std::uint32_t plain[4], transposed[4];
  ldmatrix<false>(plain, (shared + 8 * lane).data);
  ldmatrix<true>(transposed, (shared + 8 * lane).data);
  for (int i = 0; i < 4; ++i) {
    m.registers[8 * lane + i] = plain[i];
    m.registers[8 * lane + 4 + i] = transposed[i];
  }
}

}  // namespace
}  // namespace hrmcore::cuda

#define HRMCORE_TEST_ENTRY extern "C" __attribute__((visibility("default")))

HRMCORE_TEST_ENTRY const char* hrmcore_test_planted(const char* name, unsigned blocks, bool cooperative,
                                                    float* numbers, unsigned long long* count) {
  using namespace hrmcore::cuda;
  for (const Planted& p : planted) {
    if (std::strcmp(p.name, name) == 0) {
      return launch(p.kernel, {dim3(blocks), threads, shared_bytes, cooperative}, Memory{numbers, count},
                    nullptr);
    }
  }
  return "no kernel of that name";
}

HRMCORE_TEST_ENTRY const char* hrmcore_test_mma(const std::uint32_t* a, const std::uint32_t* b, float* c) {
  using namespace hrmcore::cuda;
  return launch(one_mma, {dim3(1), 32}, Fragments{a, b, c}, nullptr);
}

HRMCORE_TEST_ENTRY const char* hrmcore_test_ldmatrix(const std::uint16_t* elements,
                                                     std::uint32_t* registers) {
  using namespace hrmcore::cuda;
  return launch(one_ldmatrix, {dim3(1), 32, 512}, Matrices{elements, registers}, nullptr);
}

HRMCORE_TEST_ENTRY void hrmcore_test_shared_bytes(int device, std::uint64_t bytes) {
  hrmcore::emulator::set_shared_bytes(device, bytes);
}

HRMCORE_TEST_ENTRY int hrmcore_test_current_device() { return hrmcore::emulator::current_device(); }

HRMCORE_TEST_ENTRY std::uint64_t hrmcore_test_launches_on(int device) {
  return hrmcore::emulator::take_launches_on(device);
}

HRMCORE_TEST_ENTRY void hrmcore_test_seed(std::uint64_t seed) { hrmcore::emulator::set_seed(seed); }

HRMCORE_TEST_ENTRY void hrmcore_test_counters(std::uint64_t* out) {
  const hrmcore::emulator::Counters c = hrmcore::emulator::take_counters();
  const std::uint64_t numbers[] = {c.launches,       c.bytes_read,    c.bytes_written,
                                   c.block_barriers, c.grid_barriers, c.bytes_read_first};
  std::memcpy(out, numbers, sizeof(numbers));
}
