// Instruction sets: kernels are compiled once for each, in a namespace of its name, and chosen at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hrmcore {

enum class Isa : std::uint8_t { generic, avx2, avx512, vnni, amx, dotprod, i8mm };

const char* name(Isa isa);
std::vector<Isa> supported_isas();           // what this processor and this build can run, weakest first
Isa current_isa();                           // the strongest, or the one that HRMCORE_ISA or set_isa named
void set_isa(const std::string& requested);  // throws std::invalid_argument on an unknown or unsupported name

// Declares `void kernel(const Args&)` in each instruction set's namespace, and a dispatcher of that name in
// hrmcore. `amx` is vnni and AMX: it has objects of its own only for the kernels that use AMX.
#if defined(HRMCORE_X86)
#define HRMCORE_DECLARE_KERNEL(kernel, Args)                                                   \
  namespace generic {                                                                          \
  void kernel(const Args& args) noexcept;                                                      \
  }                                                                                            \
  namespace avx2 {                                                                             \
  void kernel(const Args& args) noexcept;                                                      \
  }                                                                                            \
  namespace avx512 {                                                                           \
  void kernel(const Args& args) noexcept;                                                      \
  }                                                                                            \
  namespace vnni {                                                                             \
  void kernel(const Args& args) noexcept;                                                      \
  }                                                                                            \
  [[maybe_unused]] static void kernel(const Args& args) noexcept {                             \
    using Function = void (*)(const Args&) noexcept;                                           \
    constexpr Function table[] = {generic::kernel, avx2::kernel, avx512::kernel, vnni::kernel, \
                                  vnni::kernel};                                               \
    table[static_cast<int>(current_isa())](args);                                              \
  }
// The same for a kernel that runs only where current_isa() is amx.
#define HRMCORE_DECLARE_AMX_KERNEL(kernel, Args) \
  namespace amx {                                \
  void kernel(const Args& args) noexcept;        \
  }                                              \
  [[maybe_unused]] static void kernel(const Args& args) noexcept { amx::kernel(args); }
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
#define HRMCORE_DECLARE_AMX_KERNEL(kernel, Args) \
  [[maybe_unused]] static void kernel(const Args&) noexcept {}
#endif

}  // namespace hrmcore
