#include "core/tensor.h"

#include <stdexcept>

namespace hrmcore {
namespace {

std::string show_shape(const TensorView& t) {
  std::string text = "(";
  for (int axis = 0; axis < t.rank; ++axis) {
    text += (axis ? ", " : "") + std::to_string(t.shape[axis]);
  }
  return text + ")";
}

// The strides of a tensor without elements say nothing.
bool empty(const TensorView& t) {
  for (int axis = 0; axis < t.rank; ++axis) {
    if (t.shape[axis] == 0) return true;
  }
  return false;
}

}  // namespace

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f64:
      return "float64";
    case DType::bf16:
      return "bfloat16";
    case DType::i8:
      return "int8";
    case DType::u8:
      return "uint8";
    case DType::u16:
      return "uint16";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::other:
      break;
  }
  return "an unsupported dtype";
}

void reject(const char* op, const char* argument, const std::string& expected, const std::string& came) {
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be " + expected + ", got " + came);
}

Check::Check(const char* op, const char* argument, const TensorView& tensor)
    : op_(op), argument_(argument), tensor_(tensor) {
  if (!tensor.given()) fail("a tensor", "None");
}

void Check::fail(const std::string& expected, const std::string& came) const {
  reject(op_, argument_, expected, came);
}

const Check& Check::cpu() const {
  if (tensor_.device != Device::cpu) fail("on the CPU", "a tensor on another device");
  return *this;
}

const Check& Check::cpu_or_cuda() const {
  if (tensor_.device == Device::other) fail("on the CPU or on CUDA", "a tensor on another device");
  return *this;
}

const Check& Check::dtype(std::initializer_list<DType> allowed) const {
  std::string expected;
  for (DType candidate : allowed) {
    if (tensor_.dtype == candidate) return *this;
    expected += (expected.empty() ? "" : " or ") + std::string(name(candidate));
  }
  fail(expected, name(tensor_.dtype));
}

const Check& Check::rank(int expected) const {
  if (tensor_.rank != expected) fail("of rank " + std::to_string(expected), "shape " + show_shape(tensor_));
  return *this;
}

const Check& Check::size(int axis, std::int64_t expected, const char* meaning) const {
  if (tensor_.shape[axis] != expected) {
    fail("of size " + std::to_string(expected) + " (" + meaning + ") in axis " + std::to_string(axis),
         "shape " + show_shape(tensor_));
  }
  return *this;
}

const Check& Check::same_shape(const TensorView& other, const char* other_name) const {
  bool same = tensor_.rank == other.rank;
  for (int axis = 0; same && axis < other.rank; ++axis) same = tensor_.shape[axis] == other.shape[axis];
  if (!same)
    fail("of the shape of " + std::string(other_name) + " " + show_shape(other), show_shape(tensor_));
  return *this;
}

const Check& Check::contiguous() const {
  if (empty(tensor_)) return *this;
  std::int64_t expected = 1;
  for (int axis = tensor_.rank - 1; axis >= 0; --axis) {
    if (tensor_.shape[axis] != 1 && tensor_.strides[axis] != expected) fail("contiguous", "a strided view");
    expected *= tensor_.shape[axis];
  }
  return *this;
}

const Check& Check::last_contiguous() const {
  const int last = tensor_.rank - 1;
  if (empty(tensor_)) return *this;
  if (tensor_.shape[last] != 1 && tensor_.strides[last] != 1)
    fail("contiguous in its last axis", "a strided view");
  return *this;
}

}  // namespace hrmcore
