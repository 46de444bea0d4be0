#pragma once

#include "core/check.h"

namespace rfk {

#ifdef RFK_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

[[noreturn]] inline void fail_without_cuda(const char* op) {
  fail(op, ": got CUDA tensors, but this build of rfkernels has no CUDA kernels; run 'rfkernels doctor'");
}

}  // namespace rfk
