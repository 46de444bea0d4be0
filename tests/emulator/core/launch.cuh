#pragma once

// Stands in for csrc/core/launch.cuh when the .cu files are compiled as C++: the threads of every
// block run one after the other on the CPU. Enough for kernels without barriers and shared memory;
// a kernel that uses either does not compile here.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/check.h"

#define __global__

namespace rfk {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};
using cudaStream_t = void*;

inline thread_local dim3 threadIdx{0}, blockIdx{0}, blockDim{1}, gridDim{1};

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};

// Blocks in descending order, so that nothing may lean on the order of the hardware.
template <typename... Params, typename... Args>
void launch(const char* what, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Args... args) {
  check(grid.x >= 1 && block.x >= 1 && block.x <= 1024, what, ": grid ", grid.x, ", block ", block.x);
  check(shared_bytes == 0, what, ": the emulator has no shared memory");
  gridDim = grid, blockDim = block;
  for (unsigned b = grid.x; b-- > 0;)
    for (unsigned t = 0; t < block.x; ++t) {
      blockIdx.x = b, threadIdx.x = t;
      kernel(args...);
    }
}

}  // namespace rfk
