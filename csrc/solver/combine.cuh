#pragma once

#include "core/launch.cuh"
#include "solver/combine.h"

// What the kernels of combine and moments share.

namespace rfk {

inline constexpr int kCombineThreads = 256, kCombineWarps = kCombineThreads / 32;
template <typename A> inline constexpr int kCombinePack = 16 / sizeof(A);  // neighbours of a thread

// N neighbours of any dtype as A; packs lie at multiples of their size.
template <int N, typename A> __device__ void load_any(A (&to)[N], AnyFloats from, int64_t at) {
  struct alignas(2 * N) Half {
    uint16_t bits[N];
  };
  struct alignas(N * sizeof(A)) Wide {
    A v[N];
  };
  if (from.dtype == DType::bf16 || from.dtype == DType::f16) {
    const Half half = *reinterpret_cast<const Half*>(static_cast<const uint16_t*>(from.data) + at);
    const bool brain = from.dtype == DType::bf16;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = brain ? load(bf16{half.bits[i]}) : load(f16{half.bits[i]});
  } else {
    const Wide wide = *reinterpret_cast<const Wide*>(static_cast<const A*>(from.data) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = wide.v[i];
  }
}

template <int N, typename A> __device__ void store_any(void* out, DType dtype, int64_t at, const A (&v)[N]) {
  struct alignas(2 * N) Half {
    uint16_t bits[N];
  };
  struct alignas(N * sizeof(A)) Wide {
    A v[N];
  };
  if (dtype == DType::bf16 || dtype == DType::f16) {
    Half half;
#pragma unroll
    for (int i = 0; i < N; ++i)
      half.bits[i] = dtype == DType::bf16 ? store<bf16>(float(v[i])).bits : store<f16>(float(v[i])).bits;
    *reinterpret_cast<Half*>(static_cast<uint16_t*>(out) + at) = half;
  } else {
    Wide wide;
#pragma unroll
    for (int i = 0; i < N; ++i) wide.v[i] = v[i];
    *reinterpret_cast<Wide*>(static_cast<A*>(out) + at) = wide;
  }
}

// A result as the next reader sees it.
template <typename A> __device__ A stored_as(A v, DType dtype) {
  if constexpr (sizeof(A) == 4) {
    if (dtype == DType::bf16) return rounded_to<bf16>(v);
    if (dtype == DType::f16) return rounded_to<f16>(v);
  }
  return v;
}

// The noise of N neighbours from element `at` of a sample on, N a divisor of a Philox block.
template <int N> struct DrawnPack {
  float v[N];

  __device__ DrawnPack(const NoiseKey& key, int64_t at) {
    float z[kDrawsPerBlock];
    draw(key, uint64_t(at / kDrawsPerBlock), z);
    const int lane = int(at % kDrawsPerBlock);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = z[i];
#pragma unroll
      for (int first = N; first < kDrawsPerBlock; first += N) v[i] = lane == first ? z[first + i] : v[i];
    }
  }
};

// The sum over a warp, in every lane.
template <typename A> __device__ A warp_sum(A v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Sums of combinations and of their products, each at a place of its own.
template <typename A> struct Sums {
  A sum[kMaxOutputs] = {}, product[kMaxOutputs][kMaxOutputs] = {};

  __device__ void add(const A (&o)[kMaxOutputs]) {
#pragma unroll
    for (int i = 0; i < kMaxOutputs; ++i) {
      sum[i] += o[i];
#pragma unroll
      for (int j = i; j < kMaxOutputs; ++j) product[i][j] += o[i] * o[j];
    }
  }

  // f(m, value): those of `count` combinations, in the order of the results.
  template <typename F> __device__ void each(int count, F f) const {
    int m = 0;
#pragma unroll
    for (int i = 0; i < kMaxOutputs; ++i)
      if (i < count) f(m++, sum[i]);
#pragma unroll
    for (int i = 0; i < kMaxOutputs; ++i)
#pragma unroll
      for (int j = i; j < kMaxOutputs; ++j)
        if (j < count) f(m++, product[i][j]);
  }
};

// The sums of a block's threads, to partials[sample, chunk].
template <typename A>
__device__ void write_sums(const CombineArgs<A>& args, const Sums<A>& sums, int count, int64_t sample,
                           int64_t chunk) {
  __shared__ double partial[kCombineWarps][kMaxMoments];
  const int moments = moments_of(count), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums.each(count, [&](int m, A value) {
    const double sum = warp_sum(double(value));
    if (lane == 0) partial[warp][m] = sum;
  });
  __syncthreads();
  if (int(threadIdx.x) < moments) {
    double sum = 0;
    for (int w = 0; w < kCombineWarps; ++w) sum += partial[w][threadIdx.x];
    args.partials[(sample * args.chunks + chunk) * moments + threadIdx.x] = sum;
  }
}

// A chunk of a sample by one block: its sums go to partials[sample, chunk].
template <int N, typename A, typename Coefs>
__device__ void sum_chunk(const CombineArgs<A>& args, const Coefs& coefs, int64_t sample, int64_t chunk) {
  const int first = coefs.first(args), last = coefs.last(args), count = coefs.count(args);
  const int64_t begin = chunk * args.chunk,
                end = begin + args.chunk < args.size ? begin + args.chunk : args.size;
  Sums<A> sums;
  A c[kMaxOutputs][kMaxInputs];
  int64_t row = -1;
  for (int64_t at = begin + int64_t(threadIdx.x) * N; at < end; at += kCombineThreads * N) {
    const int64_t element = sample * args.size + at;
    A y[kMaxInputs][N];
#pragma unroll
    for (int k = 0; k < kMaxInputs; ++k)
      if (first <= k && k < last) load_any<N>(y[k], args.in[k], element);
    if (element / args.plan.cols != row) coefs.read(args, row = element / args.plan.cols, c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A o[kMaxOutputs] = {};
#pragma unroll
      for (int j = 0; j < kMaxOutputs; ++j) {
        if (j >= count) continue;
#pragma unroll
        for (int k = 0; k < kMaxInputs; ++k)
          if (first <= k && k < last) o[j] = k == first ? c[j][k] * y[k][i] : o[j] + c[j][k] * y[k][i];
      }
      sums.add(o);
    }
  }
  write_sums(args, sums, count, sample, chunk);
}

// Sum m of a sample, by one warp.
template <typename A>
__device__ double sum_of_chunks(const CombineArgs<A>& args, int64_t sample, int moments, int m) {
  double sum = 0;
  for (int64_t c = threadIdx.x % 32; c < args.chunks; c += 32)
    sum += args.partials[(sample * args.chunks + c) * moments + m];
  return warp_sum(sum);
}

// Block b adds up the chunks of sample b, a warp for every sum.
template <typename A> __global__ void add_chunks_kernel(CombineArgs<A> args, int moments) {
  const int m = threadIdx.x / 32;
  const double sum = sum_of_chunks(args, blockIdx.x, moments, m);
  if (threadIdx.x % 32 == 0) args.sums[int64_t(blockIdx.x) * moments + m] = sum;
}

// Whether four neighbours may be moved at once: samples and rows hold a multiple of four, and every tensor is
// aligned.
template <typename A> bool takes_vectors(const CombineArgs<A>& args, int outputs) {
  uint64_t misaligned = uint64_t(args.size % 4) | uint64_t(args.plan.rows == 1 ? 0 : args.plan.cols % 4);
  const auto add = [&](const void* data, DType dtype) {
    misaligned |= reinterpret_cast<uintptr_t>(data) % uint64_t(dtype == DType::f64 ? 16 : 4 * size_of(dtype));
  };
  for (int k = 0; k < args.inputs; ++k) add(args.in[k].data, args.in[k].dtype);
  for (int j = 0; j < outputs; ++j) add(args.out[j], args.state);
  if (args.mask.data) add(args.mask.data, args.mask.dtype);
  return misaligned == 0;
}

}  // namespace rfk
