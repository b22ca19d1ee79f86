// CUDA kernels live in a library of their own beside the Python module, `_C_cuda.so`, opened when a CUDA
// tensor first comes: the module itself needs no CUDA to load. The library exports `hrmcore_<op>(const Args&,
// void* stream)`, which returns nullptr or what went wrong (csrc/core/cuda.cuh).
#pragma once

#include <string>

namespace hrmcore {

// What was before a launch went to another device; csrc/core/device.cu fills it in and puts it back.
struct DeviceBefore {
  bool changed = false;
  int device = 0;
  bool has_context = false;  // whether `context`, the driver's, is known; it may be none
  void* context = nullptr;
};

// While it lives the calling thread's launches go to this device; then to the one before again. Nothing is done where
// it is that one already. Throws std::runtime_error without a library, saying why.
class DeviceInUse {
 public:
  explicit DeviceInUse(int device);
  ~DeviceInUse();
  DeviceInUse(const DeviceInUse&) = delete;
  DeviceInUse& operator=(const DeviceInUse&) = delete;

  const char* error() const { return error_; }  // nullptr, or why the device cannot be used

 private:
  DeviceBefore before_;
  const char* error_;
  void (*leave_)(const DeviceBefore*);
};

// The address of an op's kernel. Throws std::runtime_error without a library or without that op in it, saying
// why.
void* device_kernel(const char* op);

// For tests: from now on CPU tensors go to the kernels of the library at `path`, which emulates CUDA; "" ends
// it.
void emulate_cuda(const std::string& path);
bool emulating_cuda();

}  // namespace hrmcore
