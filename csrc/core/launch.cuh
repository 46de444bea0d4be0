#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

#include "core/check.h"

namespace rfk {

inline void check_cuda(cudaError_t status, const char* what) {
  check(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// Makes `index` the current device of this thread for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (index != previous_) check_cuda(cudaSetDevice(index), "cudaSetDevice");
    changed_ = index != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Multiprocessors of a device, asked for once.
inline int processors_of(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const bool keep = device >= 0 && device < kDevices;
  int count = keep ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
    if (keep) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Whether mma.sync of a device multiplies e4m3 faster than f16 (kMultipliesE4m3 of core/ptx.cuh).
inline bool multiplies_e4m3(int device) {
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
             "cudaDeviceGetAttribute");
  return (major == 8 && minor == 9) || major >= 12;
}

// The dynamic shared memory of the block, as many bytes as its launch asked for.
template <typename T> __device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// The one place that launches a kernel; `what` names it in the error.
template <typename... Params, typename... Args>
void launch(const char* what, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  constexpr size_t kUnasked = 48 << 10;  // more dynamic shared memory must be asked for, once for a kernel
  if (shared_bytes > kUnasked)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
               what);
  const auto start = [&](Params... params) {
    void* pointers[] = {&params...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes,
                            stream);
  };
  check_cuda(start(std::forward<Args>(args)...), what);
}

}  // namespace rfk
