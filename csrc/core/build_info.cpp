#include "core/build_info.h"

#include <sstream>

namespace rfk {
namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream is(list);
  for (std::string part; is >> part;) parts.push_back(part);
  return parts;
}

#if defined(__x86_64__) && defined(__GNUC__)
// As cpuid says: __builtin_cpu_supports of GCC 12 does not know AMX.
bool has_amx_bf16() {
  unsigned eax = 7, ebx, ecx = 0, edx;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return edx >> 22 & 1;
}

void add_cpu(BuildInfo& info) {
  __builtin_cpu_init();
  info.cpu_features = {
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"fma", __builtin_cpu_supports("fma") != 0},
      {"avx512f", __builtin_cpu_supports("avx512f") != 0},
      {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni") != 0},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
      {"amx_bf16", has_amx_bf16()},
  };
#if defined(__clang__)
  info.cpu_isa = "x86-64";
#else
  info.cpu_isa = __builtin_cpu_supports("x86-64-v4")   ? "x86-64-v4"
                 : __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3"
                                                       : "x86-64";
#endif
}
#else
void add_cpu(BuildInfo& info) { info.cpu_isa = "baseline"; }
#endif

}  // namespace

BuildInfo build_info() {
  BuildInfo info;
  info.version = RFK_VERSION;
#if defined(__clang__)
  info.compiler = __VERSION__;  // "Clang 17.0.1 ..."
#else
  info.compiler = "GCC " __VERSION__;
#endif
  info.cuda = RFK_CUDA_VERSION;
  info.cuda_archs = split(RFK_CUDA_ARCHS);
  add_cpu(info);
  return info;
}

}  // namespace rfk
