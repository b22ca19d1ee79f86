#include "core/device.h"

#include <dlfcn.h>

#include <stdexcept>

namespace hrmcore {
namespace {

struct Library {
  std::string path;
  void* handle = nullptr;
  const char* (*enter_device)(int, DeviceBefore*) = nullptr;
  void (*leave_device)(const DeviceBefore*) = nullptr;
};

Library open_library(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw std::runtime_error(
        std::string("this hrmcore has no CUDA kernels, build it with HRMCORE_CUDA=ON: ") + dlerror());
  }
  const auto enter = dlsym(handle, "hrmcore_enter_device"), leave = dlsym(handle, "hrmcore_leave_device");
  if (enter == nullptr || leave == nullptr) {
    throw std::runtime_error(path + " belongs to another build of hrmcore; build both again");
  }
  return {path, handle, reinterpret_cast<decltype(Library::enter_device)>(enter),
          reinterpret_cast<decltype(Library::leave_device)>(leave)};
}

std::string beside_this_module(const char* name) {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&device_kernel), &info) == 0) return name;
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + name;
}

Library& emulator() {
  static Library library;
  return library;
}

const Library& current_library() {
  if (emulating_cuda()) return emulator();
  static const Library library = open_library(beside_this_module("_C_cuda.so"));
  return library;
}

}  // namespace

void* device_kernel(const char* op) {
  const Library& library = current_library();
  void* kernel = dlsym(library.handle, (std::string("hrmcore_") + op).c_str());
  if (kernel == nullptr) {
    throw std::runtime_error(std::string(op) + ": no CUDA kernel in " + library.path + "; run it on the CPU");
  }
  return kernel;
}

DeviceInUse::DeviceInUse(int device) : leave_(current_library().leave_device) {
  error_ = current_library().enter_device(device, &before_);
}

DeviceInUse::~DeviceInUse() {
  if (before_.changed) leave_(&before_);
}

void emulate_cuda(const std::string& path) { emulator() = path.empty() ? Library() : open_library(path); }

bool emulating_cuda() { return emulator().handle != nullptr; }

}  // namespace hrmcore
