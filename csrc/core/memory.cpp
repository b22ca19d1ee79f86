#include "core/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace hrmcore {
namespace {

constexpr std::int64_t huge_page = 2 << 20;

const timespec& changed(const struct stat& status) {
#if defined(__APPLE__)
  return status.st_mtimespec;
#else
  return status.st_mtim;
#endif
}

}  // namespace

Memory::Memory(std::int64_t bytes) : size_(bytes) {
  if (bytes <= 0) return;
  void* pages = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) {
    const auto megabytes = std::to_string((bytes + 999999) / 1000000);
    throw OutOfMemory("out of memory: the system has no " + megabytes + " MB to give");
  }
#if defined(MADV_HUGEPAGE)
  if (bytes >= huge_page) madvise(pages, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
  data_ = static_cast<std::byte*>(pages);
}

Memory::~Memory() {
  range_ = MappedRange();  // before another mapping can have its addresses
  if (data_ != nullptr) munmap(data_, static_cast<std::size_t>(size_));
  if (file_ >= 0) close(file_);
}

Memory Memory::map_file(const std::string& path, std::int64_t offset, std::int64_t bytes) {
  Memory memory;
  memory.file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (memory.file_ < 0 || fstat(memory.file_, &status) != 0) {
    throw FileError(path + ": cannot be opened (" + std::strerror(errno) + ")");
  }
  if (status.st_size < offset + bytes) {
    throw FileError(path + ": truncated, " + std::to_string(status.st_size) + " bytes where " +
                    std::to_string(offset + bytes) + " are needed");
  }
  void* pages = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ, MAP_SHARED, memory.file_, offset);
  if (pages == MAP_FAILED) throw FileError(path + ": cannot be mapped (" + std::strerror(errno) + ")");
  memory.data_ = static_cast<std::byte*>(pages);
  memory.size_ = bytes;
  memory.range_ = MappedRange(memory.data_, bytes);
  memory.file_size_ = status.st_size;
  memory.changed_seconds_ = changed(status).tv_sec;
  memory.changed_nanoseconds_ = changed(status).tv_nsec;
  return memory;
}

bool Memory::unchanged() const {
  if (file_ < 0) return true;
  struct stat status{};
  return !range_.lost() && fstat(file_, &status) == 0 && status.st_size == file_size_ &&
         changed(status).tv_sec == changed_seconds_ && changed(status).tv_nsec == changed_nanoseconds_;
}

void Memory::swap(Memory& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(file_, other.file_);
  range_.swap(other.range_);
  std::swap(file_size_, other.file_size_);
  std::swap(changed_seconds_, other.changed_seconds_);
  std::swap(changed_nanoseconds_, other.changed_nanoseconds_);
}

}  // namespace hrmcore
