// Which instruction sets were compiled in and which of them this machine runs.
#include <stdexcept>

#include "kernels.h"

namespace fastgen {

namespace baseline {
const Kernels& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

std::vector<std::string> supported_isas() {
  std::vector<std::string> names{"baseline"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    names.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      names.push_back("avx512");
  }
#endif
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  const std::vector<std::string> names = supported_isas();
  const std::string wanted = isa == "auto" ? names.back() : isa;
  std::string list;
  for (const std::string& name : names) {
    list += " " + name;
    if (name != wanted) continue;
#if defined(__x86_64__)
    if (name == "avx512") return avx512::kernels();
    if (name == "avx2") return avx2::kernels();
#endif
    return baseline::kernels();
  }
  throw std::invalid_argument("isa '" + isa + "' is not available on this machine; choose auto or one of:" + list);
}

}  // namespace fastgen
