// The tensor boundary: what a kernel sees of a Python array, and the checks that guard it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#if defined(__CUDACC__)
#define HRMCORE_HOST_DEVICE __host__ __device__
#else
#define HRMCORE_HOST_DEVICE
#endif

namespace hrmcore {

enum class DType : std::uint8_t { f32, f64, bf16, i8, u8, u16, i32, i64, other };
enum class Device : std::uint8_t { cpu, cuda, other };

const char* name(DType dtype);

// A borrowed, strided array. Strides count elements. `data == nullptr && rank == -1` is an argument left out
// (None).
struct TensorView {
  static constexpr int max_rank = 6;
  void* data = nullptr;
  int rank = -1;
  DType dtype = DType::other;
  Device device = Device::other;
  std::int64_t shape[max_rank] = {};
  std::int64_t strides[max_rank] = {};

  HRMCORE_HOST_DEVICE bool given() const { return rank >= 0; }
  template <class T>
  HRMCORE_HOST_DEVICE T* as() const {
    return static_cast<T*>(data);
  }
};

// Collects the conditions that one operand must meet; every failure is a std::invalid_argument that names the
// op, the argument, what was expected and what came. Runs with the GIL held, before any kernel.
class Check {
 public:
  Check(const char* op, const char* argument, const TensorView& tensor);
  const Check& cpu() const;
  const Check& cpu_or_cuda() const;
  const Check& dtype(std::initializer_list<DType> allowed) const;
  const Check& rank(int expected) const;
  const Check& size(int axis, std::int64_t expected,
                    const char* meaning) const;  // meaning: the letter, e.g. "T"
  const Check& same_shape(const TensorView& other, const char* other_name) const;
  const Check& contiguous() const;       // C order, no gaps
  const Check& last_contiguous() const;  // unit stride in the last axis, any stride before it

 private:
  [[noreturn]] void fail(const std::string& expected, const std::string& came) const;
  const char* op_;
  const char* argument_;
  const TensorView& tensor_;
};

[[noreturn]] void reject(const char* op, const char* argument, const std::string& expected,
                         const std::string& came);

}  // namespace hrmcore
