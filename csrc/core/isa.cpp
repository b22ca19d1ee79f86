#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace hrmcore {
namespace {

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
    case Isa::avx512:
      return v4;
    case Isa::vnni:
      return v4 && __builtin_cpu_supports("avx512vnni");
  }
  return false;
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
    case Isa::avx512:
      return "avx512";
    case Isa::vnni:
      return "vnni";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::vnni}) {
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
