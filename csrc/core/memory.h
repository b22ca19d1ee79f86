// Large blocks of memory: zeroed anonymous pages (huge ones where the system has them), or a file mapped for
// reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/mapped_file.h"

namespace hrmcore {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// A file that is missing, too short, damaged, or no longer what was mapped. In Python an OSError.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Memory {
 public:
  Memory() = default;
  explicit Memory(std::int64_t bytes);  // zeroed; throws OutOfMemory
  ~Memory();
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }

  // The part of a file from `offset` on, `bytes` long, offset a multiple of the page size. Throws
  // FileError when it is missing or too short.
  static Memory map_file(const std::string& path, std::int64_t offset, std::int64_t bytes);

  // Whether the mapped file still is what was mapped: same size and time of change, and no page was missing.
  // Always true without a file.
  bool unchanged() const;

  std::byte* data() const { return data_; }
  std::int64_t size() const { return size_; }
  bool mapped() const { return file_ >= 0; }

 private:
  void swap(Memory& other) noexcept;

  std::byte* data_ = nullptr;
  std::int64_t size_ = 0;
  int file_ = -1;
  MappedRange range_;
  std::int64_t file_size_ = 0, changed_seconds_ = 0, changed_nanoseconds_ = 0;
};

}  // namespace hrmcore
