// The device that launches go to: csrc/core/device.h.
#include "core/device.h"

#if defined(__CUDACC__)
#include <dlfcn.h>
#endif

#include "core/cuda.cuh"

#define HRMCORE_DEVICE_ENTRY extern "C" __attribute__((visibility("default")))

namespace hrmcore::cuda {
namespace {

#if defined(__CUDACC__)
// A thread that has used no device has no context, and to set device 0 again would make one there: half a gigabyte of
// a card that nobody asked for. Only the driver can put back nothing.
void* driver(const char* name) {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : dlsym(library, name);
}

const char* enter(int device, DeviceBefore& before) {
  int current = 0;
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess && current == device) return nullptr;
  static const auto context = reinterpret_cast<int (*)(void**)>(driver("cuCtxGetCurrent"));
  before.device = current;
  before.has_context = context != nullptr && context(&before.context) == 0;
  status = cudaSetDevice(device);
  before.changed = status == cudaSuccess;
  return before.changed ? nullptr : cudaGetErrorString(status);
}

void leave(const DeviceBefore& before) {
  static const auto set_context = reinterpret_cast<int (*)(void*)>(driver("cuCtxSetCurrent"));
  if (before.has_context && set_context != nullptr && set_context(before.context) == 0) return;
  cudaSetDevice(before.device);
}
#else
const char* enter(int device, DeviceBefore& before) {
  before.device = emulator::current_device();
  if (before.device == device) return nullptr;
  before.changed = emulator::set_device(device);
  return before.changed ? nullptr : "invalid device ordinal";
}

void leave(const DeviceBefore& before) { emulator::set_device(before.device); }
#endif

}  // namespace
}  // namespace hrmcore::cuda

HRMCORE_DEVICE_ENTRY const char* hrmcore_enter_device(int device, hrmcore::DeviceBefore* before) {
  return hrmcore::cuda::enter(device, *before);
}

HRMCORE_DEVICE_ENTRY void hrmcore_leave_device(const hrmcore::DeviceBefore* before) {
  hrmcore::cuda::leave(*before);
}
