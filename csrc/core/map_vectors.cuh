#pragma once

#include <algorithm>
#include <bit>

#include "core/launch.cuh"
#include "core/map_vectors.h"

namespace rfk {

// N neighbours, moved by 16-byte accesses where they fill them.
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) VectorPack {
  T v[N];
};

template <int N, typename T> __device__ VectorPack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const VectorPack<T, N>*>(from);
}

// The parameters of N columns from `column` on.
template <int N, typename T>
__device__ void load_columns(acc_t<T> (&to)[N], ColumnParam param, int64_t column) {
  if (!param.data) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = acc_t<T>(-0.0);
  } else if (sizeof(T) == 2 && param.dtype == DType::f32) {
    const auto pack = load_pack<N>(static_cast<const float*>(param.data) + column);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = load(pack.v[i]);
  } else {
    const auto pack = load_pack<N>(static_cast<const T*>(param.data) + column);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = load(pack.v[i]);
  }
}

// One thread makes N neighbours of a row, and of the rows a grid further on: x runs along a row, y over rows.
template <int N, typename T, typename Op>
__global__ void map_vectors_kernel(RowPlan plan, Vectors<T, Op> vectors, Op op) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (column >= plan.cols) return;
  acc_t<T> param[Op::kParams][N];
#pragma unroll
  for (int j = 0; j < Op::kParams; ++j) load_columns<N, T>(param[j], vectors.param[j], column);

  const int64_t rows_at_once = int64_t(gridDim.y) * blockDim.y;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < plan.rows; row += rows_at_once) {
    const RowIndex index = plan.index(row);
    VectorPack<T, N> in[Op::kInputs], out[Op::kOutputs];  // all loads are issued before the first use
#pragma unroll
    for (int j = 0; j < Op::kInputs; ++j) in[j] = load_pack<N>(vectors.in[j].at(index) + column);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      acc_t<T> v[Op::kInputs], p[Op::kParams], result[Op::kOutputs];
#pragma unroll
      for (int j = 0; j < Op::kInputs; ++j) v[j] = load(in[j].v[i]);
#pragma unroll
      for (int j = 0; j < Op::kParams; ++j) p[j] = param[j][i];
      op(v, p, result);
#pragma unroll
      for (int j = 0; j < Op::kOutputs; ++j) out[j].v[i] = store<T>(result[j]);
    }
#pragma unroll
    for (int j = 0; j < Op::kOutputs; ++j)
      *reinterpret_cast<VectorPack<T, N>*>(vectors.out[j].at(index) + column) = out[j];
  }
}

// The CUDA back end of map_vectors: 8 elements a thread where width, strides and pointers allow 16-byte
// accesses (2 of double, whose functions are long).
struct MapVectorsCuda {
  cudaStream_t stream;
  int device;

  template <typename T, typename Op>
  void operator()(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op) const {
    constexpr int kPack = sizeof(T) == 8 ? 2 : 8;
    uint64_t misaligned = uint64_t(plan.cols % kPack);
    for (const RowVectors<const T>& in : vectors.in) misaligned |= misalignment(in);
    for (const RowVectors<T>& out : vectors.out) misaligned |= misalignment(out);
    for (const ColumnParam& param : vectors.param) misaligned |= uintptr_t(param.data) % 16;

    if (misaligned)
      run<1>(plan, vectors, op);
    else
      run<kPack>(plan, vectors, op);
  }

 private:
  template <typename T> static uint64_t misalignment(const RowVectors<T>& rows) {
    uint64_t bytes = uintptr_t(rows.data);
    for (int64_t stride : rows.stride) bytes |= uint64_t(stride) * sizeof(T);
    return bytes % 16;
  }

  template <int N, typename T, typename Op>
  void run(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op) const {
    constexpr unsigned kThreads = 256, kMaxGrid = 65535;
    const int64_t packs = (plan.cols + N - 1) / N;
    const unsigned wide = unsigned(std::min<int64_t>(kThreads, (packs + 31) / 32 * 32)),
                   high = kThreads / wide;
    const dim3 grid(unsigned((packs + wide - 1) / wide),
                    unsigned(std::min<int64_t>((plan.rows + high - 1) / high, kMaxGrid)));
    const DeviceGuard guard(device);
    launch("map_vectors", map_vectors_kernel<N, T, Op>, grid, dim3(wide, high), 0, stream, plan, vectors, op);
  }
};

}  // namespace rfk
