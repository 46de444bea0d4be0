#include "kernels/collectives.h"

#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace rfk::test {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarps = 4;

__global__ void collective_kernel(int64_t* out, const int64_t* in, int op, int number) {
  const int t = threadIdx.x, value = int(in[t]), bit = (value & number) != 0;
  int64_t result = 0;
  int same = 0;
  switch (op) {
    case 0: result = __shfl_sync(kAll, value, number); break;
    case 1: result = __shfl_up_sync(kAll, value, number); break;
    case 2: result = __shfl_down_sync(kAll, value, number); break;
    case 3: result = __shfl_xor_sync(kAll, value, number); break;
    case 4: result = __shfl_up_sync(kAll, value, number, 8); break;
    case 5: result = __shfl_down_sync(kAll, value, number, 8); break;
    case 6: result = __shfl_sync(kAll, value, number, 8); break;
    case 7: result = __ballot_sync(kAll, bit); break;
    case 8: result = __any_sync(kAll, bit); break;
    case 9: result = __all_sync(kAll, bit); break;
    case 10: result = __match_any_sync(kAll, value); break;
    case 11:
      result = __match_all_sync(kAll, value, &same);
      result += same;
      break;
    case 12: result = __reduce_add_sync(kAll, unsigned(value)); break;
    case 13: result = __reduce_min_sync(kAll, unsigned(value)); break;
    case 14: result = __reduce_max_sync(kAll, unsigned(value)); break;
    case 15: result = __reduce_and_sync(kAll, unsigned(value)); break;
    case 16: result = __reduce_or_sync(kAll, unsigned(value)); break;
    case 17: result = __reduce_xor_sync(kAll, unsigned(value)); break;
    case 18: result = __syncthreads_count(bit); break;
    case 19: result = __syncthreads_or(bit) != 0; break;
    case 20: result = __syncthreads_and(bit) != 0; break;
    case 21:  // the two halves of a warp, each on its own
      if (t & 16)
        result = __ballot_sync(0xffff0000u, bit);
      else
        result = __ballot_sync(0x0000ffffu, bit);
      break;
    case 22: result = __popc(value) * 10000 + __clz(value) * 100 + __ffs(value); break;
  }
  out[t] = result;
}

__global__ void atomic_sum_kernel(unsigned long long* out) {
  __shared__ unsigned long long sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, static_cast<unsigned long long>(threadIdx.x * threadIdx.x));
  __syncthreads();
  if (threadIdx.x < 2) atomicAdd(&out[blockIdx.x], threadIdx.x == 0 ? sum : 0ull);
}

__global__ void index_kernel(int64_t* out) {
  const int64_t block = blockIdx.x + int64_t(gridDim.x) * (blockIdx.y + int64_t(gridDim.y) * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int64_t i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  out[i] = i;
}

__global__ void double_vectors_kernel(float4* out, const float4* in) {
  const float4 v = in[threadIdx.x];
  out[threadIdx.x] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

// One direction of a producer-consumer pair: warps 1 .. 3 write, warp 0 reads, all meet at barrier 1.
__global__ void produce_and_consume_kernel(int64_t* out, const int64_t* in) {
  __shared__ int64_t tile[kWarps * 32];
  const int t = threadIdx.x, warp = t / 32;
  if (warp > 0) tile[t] = in[t];
  named_barrier_sync(1, kWarps * 32);
  if (warp > 0) return;
  int64_t best = in[t];
  for (int w = 1; w < kWarps; ++w) best = tile[w * 32 + t] > best ? tile[w * 32 + t] : best;
  out[t] = best;
}

}  // namespace

void collective(Stream stream, const TensorView& out, const TensorView& in, int64_t op, int64_t number) {
  launch("collective", collective_kernel, dim3(1), dim3(64), 0, cudaStream_t(stream), out.ptr<int64_t>(),
         in.ptr<int64_t>(), int(op), int(number));
}

void atomic_sum(Stream stream, const TensorView& out, int64_t threads) {
  launch("atomic_sum", atomic_sum_kernel, dim3(unsigned(out.numel())), dim3(unsigned(threads)), 0,
         cudaStream_t(stream), out.ptr<unsigned long long>());
}

void index(Stream stream, const TensorView& out, int64_t x, int64_t y) {
  const unsigned blocks = unsigned(out.numel() / (x * y) / 6);
  launch("index", index_kernel, dim3(blocks, 2, 3), dim3(unsigned(x), unsigned(y)), 0, cudaStream_t(stream),
         out.ptr<int64_t>());
}

void double_vectors(Stream stream, const TensorView& out, const TensorView& in) {
  launch("double_vectors", double_vectors_kernel, dim3(1), dim3(unsigned(out.numel() / 4)), 0,
         cudaStream_t(stream), out.ptr<float4>(), in.ptr<float4>());
}

void produce_and_consume(Stream stream, const TensorView& out, const TensorView& in) {
  launch("produce_and_consume", produce_and_consume_kernel, dim3(1), dim3(kWarps * 32), 0,
         cudaStream_t(stream), out.ptr<int64_t>(), in.ptr<int64_t>());
}

}  // namespace rfk::test
