#include <algorithm>

#include "core/launch.cuh"
#include "moe/moe_route.h"

namespace rfk {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename T> __global__ void __launch_bounds__(kThreads) route_kernel(Route<T> route, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < rows) route(row);
}

// The sum of `mine` over the threads before this one, and over all of the block.
struct Counted {
  int before, all;
};

__device__ __forceinline__ Counted count_threads(int* warps, int mine) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = mine;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  __syncthreads();  // the sums before have been read
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Counted c{sum - mine, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) c.before += warps[w];
    c.all += warps[w];
  }
  return c;
}

// A thread's share of `count` elements: neighbours, so that they keep their order.
struct Share {
  int64_t begin, end;
  __device__ explicit Share(int64_t count) {
    const int64_t each = (count + kThreads - 1) / kThreads;
    begin = std::min(each * int(threadIdx.x), count), end = std::min(begin + each, count);
  }
};

// A block for an expert: its choices beyond `capacity`, first choices of all rows before any second choice.
template <typename T>
__global__ void __launch_bounds__(kThreads) drop_kernel(Route<T> route, int64_t rows, int64_t capacity) {
  alignas(16) __shared__ int warps[kWarps];
  const int expert = int(blockIdx.x);
  const Share share(rows);
  int64_t used = 0;
#pragma unroll 1
  for (int j = 0; j < route.top_k; ++j) {
    int mine = 0;
    for (int64_t r = share.begin; r < share.end; ++r) mine += route.experts[r * route.top_k + j] == expert;
    const Counted counted = count_threads(warps, mine);
    int64_t rank = used + counted.before;
    for (int64_t r = share.begin; r < share.end; ++r) {
      const int64_t at = r * route.top_k + j;
      if (route.experts[at] != expert || rank++ < capacity) continue;
      route.experts[at] = -1;
      route.weights[at] = 0;
    }
    used += counted.all;
  }
}

// Block e sorts the choices of expert e behind those of lower experts; the last block those without one.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int32_t* experts, int64_t choices, int32_t* offsets, int32_t* order, int32_t* slots) {
  alignas(16) __shared__ int warps[kWarps];
  const int expert = int(blockIdx.x), last = int(gridDim.x) - 1;
  const auto key = [&](int64_t i) { return experts[i] < 0 ? last : experts[i]; };
  const Share share(choices);
  int below = 0, mine = 0;
  for (int64_t i = share.begin; i < share.end; ++i) {
    below += key(i) < expert;
    mine += key(i) == expert;
  }
  const int first = count_threads(warps, below).all;
  if (threadIdx.x == 0) offsets[expert] = first;
  int slot = first + count_threads(warps, mine).before;
  for (int64_t i = share.begin; i < share.end; ++i) {
    if (key(i) != expert) continue;
    order[slot] = int32_t(i);
    slots[i] = slot++;
  }
}

}  // namespace

void moe_route_cuda(Stream stream, const TensorView& weights, const TensorView& experts,
                    const TensorView& offsets, const TensorView& order, const TensorView& slots,
                    const TensorView& logits, const std::optional<int64_t>& capacity, bool normalize,
                    const std::optional<double>& threshold) {
  const DeviceGuard guard(logits.device.index);
  const auto s = cudaStream_t(stream);
  const int64_t rows = logits.shape[0], count = logits.shape[1];
  const auto run = [&]<typename T>(const Route<T>& route) {
    if (rows == 0) return;
    const auto blocks = unsigned((rows + kThreads - 1) / kThreads);
    launch("moe_route", route_kernel<T>, dim3(blocks), dim3(kThreads), 0, s, route, rows);
    if (capacity)
      launch("moe_route", drop_kernel<T>, dim3(unsigned(count)), dim3(kThreads), 0, s, route, rows,
             *capacity);
  };
  with_route(weights, experts, logits, normalize, threshold, run);
  launch("moe_route", place_kernel, dim3(unsigned(count + 1)), dim3(kThreads), 0, s,
         static_cast<const int32_t*>(experts.ptr<int32_t>()), order.numel(), offsets.ptr<int32_t>(),
         order.ptr<int32_t>(), slots.ptr<int32_t>());
}

}  // namespace rfk
