#include "attention/kernels.h"
#include "attention/work.cuh"
#include "core/launch.cuh"
#include "core/math.h"

// Attention by multiply-and-add, for float and double. A warp has four rows; its lanes are 32 keys while it
// makes scores, and 32 channels of every 32 while it adds values.

namespace rfk {
namespace {

constexpr int kThreads = 256, kRowsOfWarp = 4, kRows = kRowsOfWarp * kThreads / 32, kKeys = 32;
constexpr int kSlab = 32;  // channels of Q and K in shared memory at a time

template <typename A> struct Slabs {
  A q[kRows][kSlab], k[kKeys][kSlab + 1];
};

template <typename A> __device__ A sum_of_warp(A v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
template <typename A> __device__ A max_of_warp(A v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, v, step);
    v = v > other ? v : other;
  }
  return v;
}

template <typename A> struct FmaRows {
  const AttentionArgs& args;
  const Work& w;
  const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) / 32 * kRowsOfWarp;
  A s[kRowsOfWarp], top[kRowsOfWarp], sum[kRowsOfWarp], o[kRowsOfWarp][kMaxHeadDim / 32];

  __device__ FmaRows(const AttentionArgs& args, const Work& w) : args(args), w(w) {
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      top[r] = -INFINITY, sum[r] = 0;
#pragma unroll
      for (int c = 0; c < kMaxHeadDim / 32; ++c) o[r][c] = 0;
    }
  }

  // s = q k^T for the lane's key, by slabs of channels; called by the whole block
  __device__ void multiply_keys(Slabs<A>& slabs, const A* q, const A* k, int keys) {
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) s[r] = 0;
#pragma unroll 1
    for (int first = 0; first < args.d; first += kSlab) {
      __syncthreads();  // what was there has been read
#pragma unroll
      for (int i = int(threadIdx.x) / 32; i < kRows; i += kThreads / 32) {
        const int c = first + lane;
        slabs.q[i][lane] = i < w.rows && c < args.d ? q[i * args.q.token + c] : A(0);
        slabs.k[i][lane] = i < keys && c < args.d ? k[i * args.k.token + c] : A(0);
      }
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kSlab; ++c)
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) s[r] = std::fma(slabs.q[row + r][c], slabs.k[lane][c], s[r]);
    }
  }

  __device__ A bias_at(int r, int key) const {
    const int64_t at = args.bias.at(w.sample, w.head, w.row + std::min(row + r, w.rows - 1)) + key;
    if (args.bias.dtype == DType::f64) return A(static_cast<const double*>(args.bias.data)[at]);
    return A(static_cast<const float*>(args.bias.data)[at]);
  }

  // Weights in place of scores, times their factor
  __device__ void weigh(int first_key) {
    const int key = first_key + lane;
    const bool seen = key < w.keys;
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      s[r] *= A(args.scale);
      if (args.bias.data && seen) s[r] += bias_at(r, key);
      if (!seen) s[r] = -INFINITY;
      const A own = max_of_warp(s[r]), highest = own > top[r] ? own : top[r];
      const A base = highest > -INFINITY ? highest : A(0), old = exp_(top[r] - base);
      top[r] = highest;
      s[r] = exp_(s[r] - base);
      sum[r] = std::fma(sum[r], old, s[r]);
#pragma unroll
      for (int c = 0; c < kMaxHeadDim / 32; ++c) o[r][c] *= old;
      if (args.factor)
        s[r] *= seen ? static_cast<const A*>(args.factor)[w.head * args.factor_head + args.rows - 1 + key -
                                                          w.row - std::min(row + r, w.rows - 1)]
                     : A(0);
    }
  }

  __device__ void add_values(const A* v, int keys) {
#pragma unroll 1
    for (int key = 0; key < (keys < kKeys ? keys : kKeys); ++key) {
      A p[kRowsOfWarp];
#pragma unroll
      for (int r = 0; r < kRowsOfWarp; ++r) p[r] = __shfl_sync(0xffffffffu, s[r], key);
#pragma unroll
      for (int c = 0; c < kMaxHeadDim / 32; ++c) {
        const A value = lane + 32 * c < args.d ? v[key * args.v.token + lane + 32 * c] : A(0);
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) o[r][c] = std::fma(p[r], value, o[r][c]);
      }
    }
  }

  __device__ void finish() {
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const A all = sum_of_warp(sum[r]);
      if (row + r >= w.rows) return;
      if (lane == 0) lse_of<A>(args, w)[row + r] = all == 0 ? A(-INFINITY) : top[r] + std::log(all);
      A* const to = out_of<A>(args, w, row + r);
#pragma unroll
      for (int c = 0; c < kMaxHeadDim / 32; ++c)
        if (lane + 32 * c < args.d) to[lane + 32 * c] = all == 0 ? A(0) : o[r][c] / all;
    }
  }
};

template <typename A> __global__ void __launch_bounds__(kThreads) attention_fma_kernel(AttentionArgs args) {
  const Work w = find_work<kRows>(args);
  if (!w.valid) return fill_with_nan<A>(args, w);
  if (w.rows <= 0 || is_of_another_kernel(args, w)) return;
  alignas(16) __shared__ unsigned char memory[sizeof(Slabs<A>)];
  Slabs<A>& slabs = *reinterpret_cast<Slabs<A>*>(memory);
  const auto of = [&](const Tokens& t, int sample, int head, int token) {
    return static_cast<const A*>(t.data) + t.at(sample, head, token);
  };
  const A* const q = of(args.q, w.sample, w.head, w.first_row);
  FmaRows<A> rows(args, w);
#pragma unroll 1
  for (int tile = next_tile<kKeys>(w, 0); tile * kKeys < w.keys; tile = next_tile<kKeys>(w, tile + 1)) {
    const int first = tile * kKeys, token = w.first_key + first;
    rows.multiply_keys(slabs, q, of(args.k, w.key_sample, w.kv_head, token), w.keys - first);
    rows.weigh(first);
    rows.add_values(of(args.v, w.key_sample, w.kv_head, token), w.keys - first);
  }
  rows.finish();
}

}  // namespace

void attention_fma(Stream stream, const AttentionArgs& args) {
  const auto run = [&]<typename A>() {
    launch("attention", attention_fma_kernel<A>, attention_grid(args, kRows), dim3(kThreads), 0,
           cudaStream_t(stream), args);
  };
  args.dtype == DType::f64 ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace rfk
