#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace sigma::cpu {
namespace {

struct Isa {
  const char* name;
  bool is_supported;
  const Kernels& (*kernels)();
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq");
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    list.push_back({"avx512bf16", has_bf16, avx512bf16::kernels});
    list.push_back({"avx512", has_avx512, avx512::kernels});
    list.push_back({"avx2", has_avx2, avx2::kernels});
#endif
    list.push_back({"base", true, base::kernels});
#if defined(SIGMA_LOWERED16)
    list.push_back({"lowered16", has_avx2, lowered16::kernels});  // the tests': last, so never chosen unnamed
#endif
    return list;
  }();
  return all;
}

const Kernels& choose() {
  const char* const chosen = std::getenv("SIGMA_ISA");
  const std::string wanted = chosen ? chosen : "";  // set but empty is not set, as in most shells' scripts
  std::string supported;
  for (const Isa& isa : isas()) {
    if (!isa.is_supported) continue;
    if (wanted.empty() || wanted == isa.name) return isa.kernels();
    supported += supported.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::runtime_error("SIGMA_ISA=" + wanted + " can't run here; this processor supports " + supported);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.is_supported) names.push_back(isa.name);
  return names;
}

}  // namespace sigma::cpu
