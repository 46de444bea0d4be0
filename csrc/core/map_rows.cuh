#pragma once

#include <algorithm>

#include "core/launch.cuh"
#include "core/map_rows.h"

namespace rfk {

// N neighbours, moved by 16-byte accesses where they fill them.
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// One thread makes N neighbouring elements of one row.
template <int N, typename T, typename V, typename Op>
__global__ void map_rows_kernel(T* out, Inputs<T, V, Op::kInputs> in, RowPlan plan, Op op) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at * N >= plan.rows * plan.cols) return;

  const int64_t row = plan.rows == 1 ? 0 : at * N / plan.cols;
  const typename Op::Row f = op.row(plan.index(row));

  Pack<V, N> rest[Op::kInputs > 1 ? Op::kInputs - 1 : 1];  // all loads are issued before the first use
  const Pack<T, N> first = reinterpret_cast<const Pack<T, N>*>(in.first)[at];
#pragma unroll
  for (int j = 1; j < Op::kInputs; ++j) rest[j - 1] = reinterpret_cast<const Pack<V, N>*>(in.rest[j - 1])[at];

  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    acc_t<T> v[Op::kInputs];
    v[0] = load(first.v[i]);
#pragma unroll
    for (int j = 1; j < Op::kInputs; ++j) v[j] = load(rest[j - 1].v[i]);
    result.v[i] = store<T>(f(v));
  }
  reinterpret_cast<Pack<T, N>*>(out)[at] = result;
}

// The CUDA back end of map_rows: 16-byte accesses where shape and pointers allow them.
struct MapRowsCuda {
  cudaStream_t stream;
  int device;

  template <typename T, typename V, typename Op>
  void operator()(T* out, const Inputs<T, V, Op::kInputs>& in, const RowPlan& plan, Op op) const {
    constexpr int kPack = 16 / sizeof(V);
    uintptr_t misaligned = plan.cols % kPack | uintptr_t(out) % 16 | uintptr_t(in.first) % 16;
    for (int j = 1; j < Op::kInputs; ++j) misaligned |= uintptr_t(in.rest[j - 1]) % 16;

    if (misaligned)
      run<1>(out, in, plan, op);
    else
      run<kPack>(out, in, plan, op);
  }

 private:
  template <int N, typename T, typename V, typename Op>
  void run(T* out, const Inputs<T, V, Op::kInputs>& in, const RowPlan& plan, Op op) const {
    constexpr int kThreads = 256;
    const int64_t threads = plan.rows * plan.cols / N;
    const DeviceGuard guard(device);
    launch("map_rows", map_rows_kernel<N, T, V, Op>, dim3(unsigned((threads + kThreads - 1) / kThreads)),
           dim3(kThreads), 0, stream, out, in, plan, op);
  }
};

}  // namespace rfk
