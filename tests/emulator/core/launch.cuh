#pragma once

// Stands in for csrc/core/launch.cuh when the .cu files are compiled as C++: same names, the grid runs on
// the CPU before `launch` returns.

#include <tuple>
#include <utility>

#include "block.h"
#include "core/check.h"
#include "cuda.h"

namespace rfk {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};

// `emulator::set_processors` decides, so that a test reaches every path that depends on it.
inline int processors_of(int) { return emulator::processors; }

// `emulator::e4m3` decides, likewise.
inline bool multiplies_e4m3(int) { return emulator::e4m3; }

template <typename T> T* dynamic_shared() { return static_cast<T*>(emulator::dynamic_shared()); }

template <typename... Params, typename... Args>
void launch(const char* what, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, {std::forward<Args>(args)...}};
  const auto thread = [](void* arg) {
    const Call& c = *static_cast<Call*>(arg);
    std::apply(c.kernel, c.params);
  };
  emulator::run({what, grid, block, shared_bytes, thread, &call, sizeof call});
}

}  // namespace rfk
