#pragma once

#include "core/launch.cuh"
#include "noise/noise_rows.h"

namespace rfk {

// One thread makes the four elements of one Philox block.
template <typename T, typename Keys, typename Op>
__global__ void noise_rows_kernel(T* out, Keys keys, NoiseShape shape, Op op) {
  const int64_t blocks = (shape.size + kDrawsPerBlock - 1) / kDrawsPerBlock;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= shape.samples * blocks) return;
  const int64_t sample = thread / blocks, block = thread % blocks;

  typename Op::Draw z[kDrawsPerBlock];
  draw(keys.of(sample), uint64_t(block), z);

  const int64_t first = sample * shape.size + block * kDrawsPerBlock;
  int64_t row = first / shape.plan.cols;
  typename Op::Row f = op.row(shape.plan.index(row));
#pragma unroll
  for (int i = 0; i < kDrawsPerBlock; ++i) {
    if (block * kDrawsPerBlock + i >= shape.size) return;
    const int64_t at = first + i;
    if (at >= (row + 1) * shape.plan.cols) f = op.row(shape.plan.index(++row));
    out[at] = f(at, z[i]);
  }
}

// The CUDA back end of noise_rows.
struct NoiseRowsCuda {
  cudaStream_t stream;
  int device;

  template <typename T, typename Keys, typename Op>
  void operator()(T* out, Keys keys, const NoiseShape& shape, Op op) const {
    constexpr int kThreads = 256;
    const int64_t threads = shape.samples * ((shape.size + kDrawsPerBlock - 1) / kDrawsPerBlock);
    const DeviceGuard guard(device);
    launch("noise_rows", noise_rows_kernel<T, Keys, Op>, dim3(unsigned((threads + kThreads - 1) / kThreads)),
           dim3(kThreads), 0, stream, out, keys, shape, op);
  }
};

}  // namespace rfk
