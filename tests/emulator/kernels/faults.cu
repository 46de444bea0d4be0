#include "kernels/faults.h"

#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace rfk::test {
namespace {

constexpr int kThreads = 256, kPair = 64;

__global__ void block_sum_kernel(float* out, const float* in, int fault) {
  __shared__ float tile[kThreads];
  const int t = threadIdx.x;
  if (fault != 4 || t != 77) tile[t] = in[blockIdx.x * kThreads + t];
  if (fault == 2 && t >= kThreads / 2) return;
  if (fault == 3 && t < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) tile[t] += tile[t + half];
    if (fault != 1 || half != kThreads / 4) __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = tile[0];
}

__global__ void copy_kernel(float* out, const float* in, int64_t n, int fault) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t end = fault == 1 ? n + 1 : n;
  if (i < end) out[i] = fault == 1 ? 0.0f : in[fault == 2 ? i - 1 : i];
}

__global__ void swap_warps_kernel(float* out, const float* in, int fault) {
  __shared__ float tile[kPair];
  const int t = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    const int i = (blockIdx.x * 2 + round) * kPair + t;
    tile[t] = in[i];
    if (fault != 1) __syncthreads();
    out[i] = tile[t ^ warpSize];
    if (fault != 2) __syncthreads();
  }
}

__global__ void copy_through_async_kernel(float* out, const float* in, int fault) {
  alignas(16) __shared__ float tile[2][kPair];
  const int t = threadIdx.x, base = blockIdx.x * 2 * kPair;
  for (int group = 0; group < 2; ++group) {
    cp_async<4>(&tile[group][t], &in[base + group * kPair + t]);
    cp_async_commit();
  }
  if (fault == 2)
    cp_async_wait<1>();
  else if (fault != 1)
    cp_async_wait<0>();
  if (fault != 3) __syncthreads();
  for (int group = 0; group < 2; ++group) {
    const int from = fault == 0 || fault == 3 ? t ^ warpSize : t;
    out[base + group * kPair + from] = tile[group][from];
  }
}

__global__ void use_shared_kernel(float* out, int64_t count, int fault) {
  float* tile = dynamic_shared<float>();
  for (int64_t i = threadIdx.x; i < count + (fault == 1); i += blockDim.x) tile[i] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = tile[0] + tile[count - 1];
}

#ifdef __CUDACC__
constexpr int kTooLarge = 1;  // nvcc would refuse to compile it
#else
constexpr int kTooLarge = 12289;
#endif

__global__ void use_block_kernel(float* out, int fault) {
  __shared__ float tile[kTooLarge];
  if (fault == 1)
    for (int i = threadIdx.x; i < kTooLarge; i += blockDim.x) tile[i] = 0;
  if (threadIdx.x == 0) out[0] = fault == 1 ? tile[0] : 0;
}

}  // namespace

void block_sum(Stream stream, const TensorView& out, const TensorView& in, int64_t fault) {
  launch("block_sum", block_sum_kernel, dim3(unsigned(out.numel())), dim3(kThreads), 0, cudaStream_t(stream),
         out.ptr<float>(), in.ptr<float>(), int(fault));
}

void copy(Stream stream, const TensorView& out, const TensorView& in, int64_t fault) {
  const int64_t n = out.numel();
  launch("copy", copy_kernel, dim3(unsigned(n / kPair + 1)), dim3(kPair), 0, cudaStream_t(stream),
         out.ptr<float>(), in.ptr<float>(), n, int(fault));
}

void swap_warps(Stream stream, const TensorView& out, const TensorView& in, int64_t fault) {
  launch("swap_warps", swap_warps_kernel, dim3(unsigned(out.numel() / (2 * kPair))), dim3(kPair), 0,
         cudaStream_t(stream), out.ptr<float>(), in.ptr<float>(), int(fault));
}

void copy_through_async(Stream stream, const TensorView& out, const TensorView& in, int64_t fault) {
  launch("copy_through_async", copy_through_async_kernel, dim3(unsigned(out.numel() / (2 * kPair))),
         dim3(kPair), 0, cudaStream_t(stream), out.ptr<float>(), in.ptr<float>(), int(fault));
}

void use_shared(Stream stream, const TensorView& out, int64_t bytes, int64_t fault) {
  launch("use_shared", use_shared_kernel, dim3(1), dim3(kPair), size_t(bytes), cudaStream_t(stream),
         out.ptr<float>(), bytes / int64_t(sizeof(float)), int(fault));
}

void use_block(Stream stream, const TensorView& out, int64_t threads, int64_t fault) {
  launch("use_block", use_block_kernel, dim3(1), dim3(unsigned(threads)), 0, cudaStream_t(stream),
         out.ptr<float>(), int(fault));
}

}  // namespace rfk::test
