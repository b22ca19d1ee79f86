// What the bindings share: DLPack tensors to TensorView, checks with the GIL held, kernels with it released.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/device.h"
#include "core/tensor.h"

namespace hrmcore::python {

namespace py = pybind11;

// The part of the DLPack ABI (dlpack.h, version 0.8) that is read here.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

inline DType dtype_of(const DlTensor& t) {
  enum : std::uint8_t { signed_integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };
  if (t.type_lanes != 1) return DType::other;
  if (t.type_code == floating && t.type_bits == 32) return DType::f32;
  if (t.type_code == floating && t.type_bits == 64) return DType::f64;
  if (t.type_code == bfloat && t.type_bits == 16) return DType::bf16;
  if (t.type_code == signed_integer && t.type_bits == 8) return DType::i8;
  if (t.type_code == unsigned_integer && t.type_bits == 8) return DType::u8;
  if (t.type_code == unsigned_integer && t.type_bits == 16) return DType::u16;
  if (t.type_code == signed_integer && t.type_bits == 32) return DType::i32;
  if (t.type_code == signed_integer && t.type_bits == 64) return DType::i64;
  return DType::other;
}

// Borrows the tensors of one call: the capsules live, unconsumed, until it returns.
class DlpackArgs {
 public:
  explicit DlpackArgs(const char* op) : op_(op) {}

  TensorView view(const py::object& array, const char* argument) {
    py::object capsule = array;
    if (!PyCapsule_CheckExact(array.ptr())) {
      if (!py::hasattr(array, "__dlpack__")) {
        reject(op_, argument, "a tensor (any DLPack producer)", py::str(py::type::of(array)));
      }
      capsule = exported(array, argument);
    }
    const auto* t = static_cast<const DlTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (t == nullptr) {
      PyErr_Clear();
      reject(op_, argument, "a DLPack capsule that nobody has consumed", "one of another kind");
    }
    if (t->ndim > TensorView::max_rank) {
      reject(op_, argument, "of rank 6 at most", "rank " + std::to_string(t->ndim));
    }
    TensorView v;
    v.data = static_cast<char*>(t->data) + t->byte_offset;
    if (t->type_bits >= 8 && reinterpret_cast<std::uintptr_t>(v.data) % (t->type_bits / 8) != 0) {
      reject(op_, argument, "aligned to its element size", "a misaligned view");
    }
    v.rank = t->ndim;
    v.dtype = dtype_of(*t);
    constexpr std::int32_t dl_cpu = 1, dl_cuda = 2;
    v.device = t->device_type == dl_cpu    ? Device::cpu
               : t->device_type == dl_cuda ? Device::cuda
                                           : Device::other;
    std::int64_t packed = 1;
    for (int axis = t->ndim - 1; axis >= 0; --axis) {
      v.shape[axis] = t->shape[axis];
      v.strides[axis] = t->strides != nullptr ? t->strides[axis] : packed;
      packed *= t->shape[axis];
    }
    if (!capsules_.empty() && (v.device != device_ || t->device_id != number_)) {
      reject(op_, argument, "on the device of the operands before it", "a tensor on another device");
    }
    device_ = v.device;
    number_ = t->device_id;
    capsules_.push_back(std::move(capsule));
    return v;
  }

  const char* op() const { return op_; }
  Device device() const { return device_; }      // of all operands
  int device_number() const { return number_; }  // among those of its kind

  TensorView optional(const py::object& array, const char* argument) {
    return array.is_none() ? TensorView{} : view(array, argument);
  }

 private:
  py::object exported(const py::object& array, const char* argument) const {
    try {
      return array.attr("__dlpack__")();
    } catch (const py::error_already_set& error) {
      reject(op_, argument, "an array that can be exported through DLPack", error.what());
    }
  }

  const char* op_;
  Device device_ = Device::cpu;
  std::int32_t number_ = 0;
  std::vector<py::object> capsules_;
};

template <class Args>
void run(const Args& args, void (*kernel)(const Args&) noexcept) {
  check(args);
  py::gil_scoped_release unlocked;
  kernel(args);
}

// Launches on this device, whichever the calling thread uses, in the order of a stream of the device.
template <class Args>
void run_on_cuda(const char* op, int device, std::uintptr_t stream, const Args& args) {
  using Launch = const char* (*)(const Args&, void*);
  const auto launch = reinterpret_cast<Launch>(device_kernel(op));
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    const DeviceInUse in_use(device);
    error = in_use.error() != nullptr ? in_use.error() : launch(args, reinterpret_cast<void*>(stream));
  }
  if (error != nullptr) throw std::runtime_error(std::string(op) + " on CUDA: " + error);
}

// The same for an op that has CUDA kernels: runs where its operands are, on CUDA in the order of the stream.
template <class Args>
void run(const DlpackArgs& operands, std::uintptr_t stream, const Args& args,
         void (*kernel)(const Args&) noexcept) {
  check(args);
  if (operands.device() != Device::cpu || emulating_cuda()) {
    run_on_cuda(operands.op(), operands.device_number(), stream, args);
    return;
  }
  py::gil_scoped_release unlocked;
  kernel(args);
}

void bind_cuda_step(py::module_& m);
void bind_engine(py::module_& m);
void bind_sampler(py::module_& m);

}  // namespace hrmcore::python
