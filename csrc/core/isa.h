// Instruction sets: kernels are compiled once for each, in a namespace of its name, and chosen at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hrmcore {

enum class Isa : std::uint8_t { generic, avx2, avxvnni, avx512, vnni, bf16, amx, dotprod, i8mm };

const char* name(Isa isa);
std::vector<Isa> supported_isas();           // what this processor and this build can run, weakest first
Isa current_isa();                           // the strongest, or the one that HRMCORE_ISA or set_isa named
void set_isa(const std::string& requested);  // throws std::invalid_argument on an unknown or unsupported name

// Declares `void kernel(const Args&)` in each instruction set's namespace, and a dispatcher of that name in
// hrmcore. `bf16` is vnni and AVX-512 BF16, `amx` that and AMX: they have objects of their own only for the
// kernels that use these.
#if defined(HRMCORE_X86)
#define HRMCORE_DECLARE_KERNEL(kernel, Args)                                                      \
  namespace generic {                                                                             \
  void kernel(const Args& args) noexcept;                                                         \
  }                                                                                               \
  namespace avx2 {                                                                                \
  void kernel(const Args& args) noexcept;                                                         \
  }                                                                                               \
  namespace avxvnni {                                                                             \
  void kernel(const Args& args) noexcept;                                                         \
  }                                                                                               \
  namespace avx512 {                                                                              \
  void kernel(const Args& args) noexcept;                                                         \
  }                                                                                               \
  namespace vnni {                                                                                \
  void kernel(const Args& args) noexcept;                                                         \
  }                                                                                               \
  [[maybe_unused]] static void kernel(const Args& args) noexcept {                                \
    using Function = void (*)(const Args&) noexcept;                                              \
    constexpr Function table[] = {generic::kernel, avx2::kernel, avxvnni::kernel, avx512::kernel, \
                                  vnni::kernel,    vnni::kernel, vnni::kernel};                   \
    table[static_cast<int>(current_isa())](args);                                                 \
  }
// The same for a kernel that runs only where current_isa() is more than generic.
#define HRMCORE_DECLARE_TILE_KERNEL(kernel, Args)                                \
  namespace avx2 {                                                               \
  void kernel(const Args& args) noexcept;                                        \
  }                                                                              \
  namespace avxvnni {                                                            \
  void kernel(const Args& args) noexcept;                                        \
  }                                                                              \
  namespace avx512 {                                                             \
  void kernel(const Args& args) noexcept;                                        \
  }                                                                              \
  namespace vnni {                                                               \
  void kernel(const Args& args) noexcept;                                        \
  }                                                                              \
  namespace bf16 {                                                               \
  void kernel(const Args& args) noexcept;                                        \
  }                                                                              \
  namespace amx {                                                                \
  void kernel(const Args& args) noexcept;                                        \
  }                                                                              \
  [[maybe_unused]] static void kernel(const Args& args) noexcept {               \
    using Function = void (*)(const Args&) noexcept;                             \
    constexpr Function table[] = {avx2::kernel, avxvnni::kernel, avx512::kernel, \
                                  vnni::kernel, bf16::kernel,    amx::kernel};   \
    table[static_cast<int>(current_isa()) - 1](args);                            \
  }
// The same for a kernel that runs only where current_isa() is bf16 or amx.
#define HRMCORE_DECLARE_BF16_KERNEL(kernel, Args)                       \
  namespace bf16 {                                                      \
  void kernel(const Args& args) noexcept;                               \
  }                                                                     \
  namespace amx {                                                       \
  void kernel(const Args& args) noexcept;                               \
  }                                                                     \
  [[maybe_unused]] static void kernel(const Args& args) noexcept {      \
    current_isa() == Isa::amx ? amx::kernel(args) : bf16::kernel(args); \
  }
#else
#if defined(HRMCORE_ARM64)
#define HRMCORE_DECLARE_KERNEL(kernel, Args)                             \
  namespace generic {                                                    \
  void kernel(const Args& args) noexcept;                                \
  }                                                                      \
  namespace dotprod {                                                    \
  void kernel(const Args& args) noexcept;                                \
  }                                                                      \
  namespace i8mm {                                                       \
  void kernel(const Args& args) noexcept;                                \
  }                                                                      \
  [[maybe_unused]] static void kernel(const Args& args) noexcept {       \
    const Isa isa = current_isa();                                       \
    if (isa == Isa::i8mm) return i8mm::kernel(args);                     \
    isa == Isa::dotprod ? dotprod::kernel(args) : generic::kernel(args); \
  }
#else
#define HRMCORE_DECLARE_KERNEL(kernel, Args) \
  namespace generic {                        \
  void kernel(const Args& args) noexcept;    \
  }                                          \
  [[maybe_unused]] static void kernel(const Args& args) noexcept { generic::kernel(args); }
#endif
#define HRMCORE_DECLARE_TILE_KERNEL(kernel, Args) \
  [[maybe_unused]] static void kernel(const Args&) noexcept {}
#define HRMCORE_DECLARE_BF16_KERNEL(kernel, Args) HRMCORE_DECLARE_TILE_KERNEL(kernel, Args)
#endif

}  // namespace hrmcore
