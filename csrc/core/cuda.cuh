// What every kernel stands on: launching, memory access, sums over a warp.
//
// A .cu file is compiled by nvcc for the device and, for the tests, by the host compiler against the emulator
// of csrc/emulator, which the build puts in front of it. Global and shared memory are therefore reached
// through the accessors below, plain loads and stores under nvcc and checked ones in the emulator.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "core/ptx.cuh"
#include "core/tensor.h"

// An op's CUDA kernel as csrc/core/device.h looks it up: returns nullptr, or what went wrong.
#define HRMCORE_DEVICE_KERNEL(kernel, Args)                                                        \
  extern "C" __attribute__((visibility("default"))) const char* hrmcore_##kernel(const Args& args, \
                                                                                 void* stream)

namespace hrmcore::cuda {

struct LaunchShape {
  dim3 grid;
  int threads;  // of a block, in one dimension
  std::size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks at once, for a grid barrier
};

// The one way to start a kernel. Without blocks there is nothing to start. Returns nullptr, or what went
// wrong.
template <class Params>
const char* launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params,
                   void* stream HRMCORE_SITE) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return nullptr;
#if defined(__CUDACC__)
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > 48 << 10) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.shared_bytes));
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  void* arguments[] = {const_cast<Params*>(&params)};
  status = cudaLaunchKernelExC(&config, function, arguments);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
#else
  static_cast<void>(stream);
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  const emulator::Shape emulated{shape.grid, static_cast<unsigned>(shape.threads), shape.shared_bytes,
                                 shape.cooperative};
  return emulator::run(
      emulated,
      [](const void* context) {
        const Call& c = *static_cast<const Call*>(context);
        c.kernel(*c.params);
      },
      &call, site);
#endif
}

// n consecutive numbers of a thread, as float32.
template <int n>
struct Floats {
  float at[n];
  __device__ float& operator[](int i) { return at[i]; }
  __device__ float operator[](int i) const { return at[i]; }
};

template <class T, int n>
struct alignas(n * sizeof(T)) Packed {
  T at[n];
};

// How many elements a 16-byte access moves.
template <class T>
constexpr int widest = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 x) { return from_f16(x); }
__device__ __forceinline__ void assign(float& target, float x) { target = x; }
__device__ __forceinline__ void assign(bf16& target, float x) { target = to_bf16(x); }
__device__ __forceinline__ void assign(f16& target, float x) { target = to_f16(x); }

// x as an element of type T would hold it.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  T element;
  assign(element, x);
  return to_float(element);
}

// One access to global memory; p must be aligned to all n elements.
template <int n, class T>
__device__ __forceinline__ Packed<T, n> load_packed(const T* p HRMCORE_SITE) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Packed<T, n>*>(p);
#else
  emulator::global_access(p, sizeof(Packed<T, n>), false, site);
  Packed<T, n> packed;
  __builtin_memcpy(&packed, p, sizeof(packed));
  return packed;
#endif
}

template <int n, class T>
__device__ __forceinline__ void store_packed(T* p, const Packed<T, n>& packed HRMCORE_SITE) {
#if defined(__CUDACC__)
  *reinterpret_cast<Packed<T, n>*>(p) = packed;
#else
  emulator::global_access(p, sizeof(packed), true, site);
  __builtin_memcpy(p, &packed, sizeof(packed));
#endif
}

// The same with the conversion from and to float32, in as many accesses as it takes.
template <int n, class T>
__device__ __forceinline__ Floats<n> load(const T* p HRMCORE_SITE) {
  constexpr int piece = n < widest<T> ? n : widest<T>;
  Floats<n> v;
#pragma unroll
  for (int first = 0; first < n; first += piece) {
    const Packed<T, piece> packed = load_packed<piece>(p + first HRMCORE_PASS_SITE);
#pragma unroll
    for (int i = 0; i < piece; ++i) v[first + i] = to_float(packed.at[i]);
  }
  return v;
}

template <int n, class T>
__device__ __forceinline__ void store(T* p, const Floats<n>& v HRMCORE_SITE) {
  constexpr int piece = n < widest<T> ? n : widest<T>;
#pragma unroll
  for (int first = 0; first < n; first += piece) {
    Packed<T, piece> packed;
#pragma unroll
    for (int i = 0; i < piece; ++i) assign(packed.at[i], v[first + i]);
    store_packed<piece>(p + first, packed HRMCORE_PASS_SITE);
  }
}

template <class T>
__device__ __forceinline__ T load_one(const T* p HRMCORE_SITE) {
#if !defined(__CUDACC__)
  emulator::global_access(p, sizeof(T), false, site);
#endif
  return *p;
}

// Dynamic shared memory from a byte offset on.
template <class T>
struct SharedArray {
  T* data;
#if defined(__CUDACC__)
  __device__ __forceinline__ T& operator[](int i) const { return data[i]; }
#else
  emulator::SharedReference<T> operator[](emulator::Index i) const { return {data + i.value, i.site}; }
#endif
  __device__ __forceinline__ SharedArray operator+(int i) const { return {data + i}; }
};

template <class T>
__device__ __forceinline__ SharedArray<T> shared_array(std::size_t offset) {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return {reinterpret_cast<T*>(shared_memory + offset)};
#else
  return {reinterpret_cast<T*>(emulator::shared_memory() + offset)};
#endif
}

// One access to shared memory; the place must be aligned to all n elements.
template <int n, class T>
__device__ __forceinline__ Packed<T, n> load_shared(SharedArray<T> from HRMCORE_SITE) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Packed<T, n>*>(from.data);
#else
  emulator::shared_access(from.data, sizeof(Packed<T, n>), false, site);
  Packed<T, n> packed;
  __builtin_memcpy(&packed, from.data, sizeof(packed));
  return packed;
#endif
}

template <int n, class T>
__device__ __forceinline__ void store_shared(SharedArray<T> to, const Packed<T, n>& packed HRMCORE_SITE) {
#if defined(__CUDACC__)
  *reinterpret_cast<Packed<T, n>*>(to.data) = packed;
#else
  emulator::shared_access(to.data, sizeof(packed), true, site);
  __builtin_memcpy(to.data, &packed, sizeof(packed));
#endif
}

// The shared memory of one multiprocessor of the device in use; the emulator's is that of sm_80.
inline int shared_bytes_of_multiprocessor() {
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return bytes;
#else
  return 164 << 10;
#endif
}

// How many multiprocessors the device in use has; the emulator's has one.
inline int multiprocessors_of_device() {
#if defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
#else
  return 1;
#endif
}

// The sum over a warp, in every lane, always added in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}

// Whether every row of these tensors, the ones left out aside, is made of whole, aligned 16-byte pieces.
inline bool rows_are_wide(std::initializer_list<const TensorView*> tensors) {
  for (const TensorView* tensor : tensors) {
    if (!tensor->given()) continue;
    const std::int64_t lanes = tensor->dtype == DType::bf16 ? widest<bf16> : widest<float>;
    if (reinterpret_cast<std::uintptr_t>(tensor->data) % 16 != 0) return false;
    if (tensor->shape[tensor->rank - 1] % lanes != 0) return false;
    for (int axis = 0; axis + 1 < tensor->rank; ++axis) {
      if (tensor->strides[axis] % lanes != 0) return false;
    }
  }
  return true;
}

// f(an element of the dtype, the constant number of elements of an access).
template <class F>
const char* with_element(DType dtype, bool wide, const F& f) {
  using One = std::integral_constant<int, 1>;
  if (dtype == DType::bf16) {
    return wide ? f(bf16{}, std::integral_constant<int, widest<bf16>>()) : f(bf16{}, One());
  }
  return wide ? f(float{}, std::integral_constant<int, widest<float>>()) : f(float{}, One());
}

}  // namespace hrmcore::cuda
