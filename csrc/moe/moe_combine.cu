#include "core/map_rows.cuh"
#include "moe/moe_combine.h"

namespace rfk {
namespace {

constexpr int kThreads = 256;

// A thread makes N neighbours of a row.
template <int N, typename T> __global__ void __launch_bounds__(kThreads) combine_kernel(Combine<T> c) {
  const int64_t pieces = c.width / N, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = at / pieces, column = at % pieces * N;
  if (row >= c.rows) return;
  const auto read = [&](const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from + column); };
  acc_t<T> sums[N] = {};
  if (c.residual) {
    const Pack<T, N> v = read(c.residual + row * c.res_stride);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = load(v.v[i]);
  }
#pragma unroll 1
  for (int j = 0; j < c.top_k; ++j) {
    const T* const y = c.chosen(row, j);
    if (!y) continue;
    const acc_t<T> weight = c.weights[row * c.top_k + j];
    const Pack<T, N> v = read(y);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += weight * load(v.v[i]);
  }
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.v[i] = store<T>(sums[i]);
  *reinterpret_cast<Pack<T, N>*>(c.out + row * c.width + column) = result;
}

template <int N, typename T> void run(cudaStream_t stream, const Combine<T>& c) {
  const int64_t blocks = (c.rows * (c.width / N) + kThreads - 1) / kThreads;
  launch("moe_combine", combine_kernel<N, T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, c);
}

}  // namespace

void moe_combine_cuda(Stream stream, const TensorView& out, const TensorView& y, const TensorView& weights,
                      const TensorView& slots, const TensorView& offsets, const Optional& residual) {
  const DeviceGuard guard(out.device.index);
  with_combine(out, y, weights, slots, offsets, residual, [&]<typename T>(const Combine<T>& c) {
    constexpr int kPack = 16 / sizeof(T);
    const uintptr_t off = uintptr_t(c.out) | uintptr_t(c.y) | uintptr_t(c.residual) |
                          uintptr_t((c.width | c.y_stride | c.res_stride) * int64_t(sizeof(T)));
    off % 16 ? run<1>(cudaStream_t(stream), c) : run<kPack>(cudaStream_t(stream), c);
  });
}

}  // namespace rfk
