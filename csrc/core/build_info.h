#pragma once

#include <string>
#include <utility>
#include <vector>

namespace rfk {

// What this library was built from and for, and what the CPU it runs on offers.
struct BuildInfo {
  std::string version, compiler, cuda;  // cuda: toolkit version, empty without CUDA kernels
  std::vector<std::string> cuda_archs;
  std::vector<std::pair<std::string, bool>> cpu_features;
  std::string cpu_isa;  // the version of the elementwise loops that runs here
};

BuildInfo build_info();

}  // namespace rfk
