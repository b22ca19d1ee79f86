// CUDA's execution model on one processor thread: what a .cu file sees of CUDA when the host compiler
// compiles it. Forced into those files by the build (-include); nothing else includes it.
//
// A thread is a fiber. It runs until it waits: at a barrier, in an operation of its warp, or at its end.
// Which warp goes on then, in which order its lanes run, and how many blocks are under way at once, a seeded
// generator decides; a kernel that is right computes the same bits for every seed. What is an error here, and
// stops the launch with a message that says who waits where, is undefined or a hang on hardware:
//   - a barrier that not every thread of the block reaches, or that threads reach in different places;
//   - a warp operation whose lanes disagree about the mask or the place, or whose mask names a lane that has
//     left;
//   - a grid barrier in a launch that is not cooperative, that a block arrives at twice or waits at without
//   having arrived, or whose state is read between the two; a deadlock of any kind;
//   - shared memory accessed outside the bytes asked for, or misaligned; never-written bytes read as NaNs;
//   - two accesses to the same bytes, one a write, with no barrier in between that both threads passed;
//   - cp.async copies that nobody waited for (their target holds NaNs until the wait).
// csrc/README.md lists what stays unseen.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace hrmcore::emulator {

struct Site {
  const char* file;
  int line;
};

constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Shape {
  dim3 grid;
  unsigned threads;  // of a block
  std::size_t shared_bytes;
  bool cooperative;
};

constexpr std::size_t max_shared_bytes = 227 << 10;

// Two devices are pretended. A thread's launches go to the one that it has set, at first 0; how many went to each is
// all that tells them apart, with their shared memory.
constexpr int most_devices = 2;
int current_device();
bool set_device(int device);                 // false: there is none of this number
std::uint64_t take_launches_on(int device);  // and starts again from zero

// What a kernel that asks takes for the current device's shared memory: 99 KB until set_shared_bytes says otherwise.
std::size_t shared_bytes_of_device();
void set_shared_bytes(int device, std::size_t bytes);

// What the launches so far did, by count: the bytes that kernels asked of global memory, caches not
// considered; and of those read the ones that nobody had read since the last grid barrier or launch, which is
// what comes from memory where a cache holds what blocks read one after the other.
struct Counters {
  std::uint64_t launches = 0, bytes_read = 0, bytes_written = 0, block_barriers = 0, grid_barriers = 0,
                bytes_read_first = 0;
};
Counters take_counters();  // and starts again from zero
void set_seed(std::uint64_t seed);

// Runs body(params) in every thread of the grid. Returns nullptr, or what went wrong, valid until the next
// launch.
const char* run(const Shape& shape, void (*body)(const void* params), const void* params, Site site);

// What the running thread sees.
struct Coordinates {
  dim3 thread, block, block_size, grid_size;
};
extern const Coordinates* running;

[[noreturn]] void fail(const char* what, Site site);
void block_barrier(Site site);
void grid_state_read(Site site);
void grid_arrive(Site site);
void grid_wait(Site site);
std::byte* shared_memory();
void shared_access(const void* address, std::size_t bytes, bool write, Site site);
void global_access(const void* address, std::size_t bytes, bool write, Site site);
void copy_async(void* shared, const void* global, std::size_t bytes, std::size_t filled, Site site);
void commit_copies();
void wait_for_copies(unsigned groups_left, Site site);

// An operation of the lanes in `mask`: the last to arrive computes every lane's output from every lane's
// input. Lanes outside of the mask have null pointers. With a null `combine` it is __syncwarp.
using Combine = void (*)(const void* const (&in)[32], void* const (&out)[32]);
void warp_operation(const char* what, unsigned mask, const void* in, void* out, Combine combine, Site site);

template <class T>
struct Shuffled {
  T value;
  int source;
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, Site site) {
  const Shuffled<T> mine{value, source};
  T result{};
  warp_operation(
      what, mask, &mine, &result,
      [](const void* const(&in)[32], void* const(&out)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          if (in[lane] == nullptr) continue;
          const void* from = in[static_cast<const Shuffled<T>*>(in[lane])->source & 31];
          if (from == nullptr) fail("a shuffle reads a lane that is not in its mask", here());
          *static_cast<T*>(out[lane]) = static_cast<const Shuffled<T>*>(from)->value;
        }
      },
      site);
  return result;
}

// An index that knows where in the source it was written.
struct Index {
  int value;
  Site site;
  Index(int value_, Site site_ = here()) : value(value_), site(site_) {}
};

// A place in shared memory: what SharedArray's operator[] gives in place of T&.
template <class T>
class SharedReference {
 public:
  SharedReference(T* p, Site site) : p_(p), site_(site) {}
  SharedReference(const SharedReference&) = default;
  operator T() const {
    shared_access(p_, sizeof(T), false, site_);
    return *p_;
  }
  const SharedReference& operator=(T value) const {
    shared_access(p_, sizeof(T), true, site_);
    *p_ = value;
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const {
    return *this = static_cast<T>(other);
  }

 private:
  T* p_;
  Site site_;
};

}  // namespace hrmcore::emulator

#define threadIdx (::hrmcore::emulator::running->thread)
#define blockIdx (::hrmcore::emulator::running->block)
#define blockDim (::hrmcore::emulator::running->block_size)
#define gridDim (::hrmcore::emulator::running->grid_size)

inline void __syncthreads(hrmcore::emulator::Site site = hrmcore::emulator::here()) {
  hrmcore::emulator::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       hrmcore::emulator::Site site = hrmcore::emulator::here()) {
  hrmcore::emulator::warp_operation("__syncwarp", mask, nullptr, nullptr, nullptr, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, hrmcore::emulator::Site site = hrmcore::emulator::here()) {
  return hrmcore::emulator::shuffle("__shfl_sync", mask, value, source, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, hrmcore::emulator::Site site = hrmcore::emulator::here()) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return hrmcore::emulator::shuffle("__shfl_xor_sync", mask, value, lane ^ by, site);
}

unsigned __ballot_sync(unsigned mask, int vote, hrmcore::emulator::Site site = hrmcore::emulator::here());

inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class T>
T atomicAdd(T* target, std::common_type_t<T> more) {
  const T before = *target;  // threads change only where they wait, so this is one step
  *target = before + more;
  return before;
}
