#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(HRMCORE_X86)
#include <cpuid.h>
#endif
#if defined(HRMCORE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(HRMCORE_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(HRMCORE_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace hrmcore {
namespace {

#if defined(HRMCORE_ARM64)
#if defined(__linux__)
// The bits are the kernel's interface to programs, arch/arm64/include/uapi/asm/hwcap.h; old headers lack them.
bool has_dotprod() { return ((getauxval(AT_HWCAP) >> 20) & 1) != 0; }  // HWCAP_ASIMDDP
bool has_i8mm() { return ((getauxval(AT_HWCAP2) >> 13) & 1) != 0; }    // HWCAP2_I8MM
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  std::size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

#if defined(HRMCORE_X86)
// Bit `bit` of a register (0 eax, 1 ebx, 2 ecx, 3 edx) of cpuid leaf 7. The compilers' own names for these
// came late.
bool has_feature(unsigned subleaf, int reg, int bit) {
  unsigned registers[4] = {};
  return __get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) != 0 &&
         ((registers[reg] >> bit) & 1) != 0;
}

// Linux gives a process the tile registers only on request, for they make every saved context 8 KiB larger.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}

bool has_avx512_bf16() { return has_feature(1, 0, 5); }

bool has_amx() {
  const bool amx_bf16 = has_feature(0, 3, 22), amx_tile = has_feature(0, 3, 24);
  const bool amx_int8 = has_feature(0, 3, 25), avx512_vbmi = has_feature(0, 2, 1);
  return amx_bf16 && amx_tile && amx_int8 && avx512_vbmi && may_use_tiles();
}
#endif

bool runs_here(Isa isa) {
#if defined(HRMCORE_X86)
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case Isa::avxvnni:
      return runs_here(Isa::avx2) && has_feature(1, 0, 4);
    case Isa::avx512:
      return v4;
    case Isa::vnni:
      return v4 && __builtin_cpu_supports("avx512vnni");
    case Isa::bf16:
      return runs_here(Isa::vnni) && has_avx512_bf16();
    case Isa::amx:
      return runs_here(Isa::bf16) && has_amx();
    default:
      return false;
  }
#elif defined(HRMCORE_ARM64)
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::dotprod:
      return has_dotprod();
    case Isa::i8mm:
      return has_dotprod() && has_i8mm();
    default:
      return false;
  }
#else
  return isa == Isa::generic;
#endif
}

Isa& selected() {
  static Isa isa = supported_isas().back();
  return isa;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avxvnni:
      return "avxvnni";
    case Isa::avx512:
      return "avx512";
    case Isa::vnni:
      return "vnni";
    case Isa::bf16:
      return "bf16";
    case Isa::amx:
      return "amx";
    case Isa::dotprod:
      return "dotprod";
    case Isa::i8mm:
      return "i8mm";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::vnni, Isa::bf16, Isa::amx,
                  Isa::dotprod, Isa::i8mm}) {
    if (runs_here(isa)) found.push_back(isa);
  }
  return found;
}

Isa current_isa() { return selected(); }

void set_isa(const std::string& requested) {
  std::string choices;
  for (Isa isa : supported_isas()) {
    if (requested == name(isa)) {
      selected() = isa;
      return;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("instruction set '" + requested +
                              "' is unknown or not supported here; choose one of " + choices);
}

}  // namespace hrmcore
