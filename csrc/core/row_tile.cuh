#pragma once

#include "core/check.h"
#include "core/quantize.h"

// One row of a tensor in the registers of one block: thread t holds the packs t, t + threads, ... of eight
// neighbours, so that a warp holds 256 neighbours in a row and memory is moved by 16-byte accesses.

namespace rfk {

inline constexpr int kPack = 8;
inline constexpr int kTileThreads = 640;  // at most; a kernel bounds them by the registers that it needs

template <typename T> struct alignas(8 * sizeof(T) < 16 ? 8 : 16) Pack8 {
  T v[kPack];
};

// Eight neighbours; kVector: 16-byte aligned, and the width is a multiple of eight.
template <bool kVector, typename T> __device__ Pack8<T> load_pack(const T* row, int64_t at, int64_t width) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Pack8<T>*>(row + at);
  } else {
    Pack8<T> p{};
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (at + i < width) p.v[i] = row[at + i];
    return p;
  }
}

template <bool kVector, typename T>
__device__ void store_pack(T* row, int64_t at, int64_t width, const Pack8<T>& p) {
  if constexpr (kVector) {
    *reinterpret_cast<Pack8<T>*>(row + at) = p;
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (at + i < width) row[at + i] = p.v[i];
  }
}

// The threads of a block, at most kThreads, whose tile holds a row of the plan.
template <int K, int kThreads> unsigned tile_threads(const char* op, const RowPlan& plan) {
  static_assert(kThreads <= kTileThreads);
  constexpr int64_t kPerWarp = 32 * K * kPack, kWidest = K * kPack * kThreads;
  check(plan.cols <= kWidest && plan.rows <= INT32_MAX, op, ": expected at most ", INT32_MAX,
        " rows of at most ", kWidest, " on CUDA, got ", plan.rows, " of ", plan.cols);
  return 32 * unsigned((plan.cols + kPerWarp - 1) / kPerWarp);
}

// The sum of v (the maximum of m) over the block. Every use in a kernel, or between two barriers, has a slot
// of its own, so that no barrier is needed behind it.
inline constexpr int kReduceSlots = 5;

template <typename A, typename F> __device__ A block_reduce(A v, int slot, F combine) {
  alignas(16) __shared__ A partial[kReduceSlots][kTileThreads / 32];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = combine(v, __shfl_xor_sync(0xffffffffu, v, lane));
  const int warps = blockDim.x / 32;
  if (warps == 1) return v;
  if (threadIdx.x % 32 == 0) partial[slot][threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[slot][0];
  for (int w = 1; w < warps; ++w) v = combine(v, partial[slot][w]);
  return v;
}

template <typename A> __device__ A block_sum(A v, int slot) {
  return block_reduce(v, slot, [](A a, A b) { return a + b; });
}

__device__ inline uint32_t block_max(uint32_t v, int slot) {
  return block_reduce(v, slot, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}

// A row of up to K * 8 * blockDim.x values. `f(v, at)` visits the eight values v from column `at` on.
template <typename A, int K, bool kVector> struct RowTile {
  A v[K][kPack];
  int width;

  template <typename F> __device__ void each(F f) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int at = kPack * int(threadIdx.x + k * blockDim.x);
      if (at < width) f(v[k], at);
    }
  }
  // Visits what lies inside of the row, value by value.
  template <typename F> __device__ void each_value(F f) {
    each([&](A(&values)[kPack], int at) {
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (kVector || at + i < width) f(values[i]);
    });
  }

  template <typename T> __device__ void load_row(const T* row) {
    each([&](A(&values)[kPack], int at) {
      const Pack8<T> p = load_pack<kVector>(row, at, width);
#pragma unroll
      for (int i = 0; i < kPack; ++i) values[i] = load(p.v[i]);
    });
  }

  template <typename T> __device__ void store_row(T* row) {
    each([&](A(&values)[kPack], int at) {
      Pack8<T> p;
#pragma unroll
      for (int i = 0; i < kPack; ++i) p.v[i] = store<T>(values[i]);
      store_pack<kVector>(row, at, width, p);
    });
  }

  template <typename T> __device__ void round_to() {
    each([](A(&values)[kPack], int) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) values[i] = load(store<T>(values[i]));
    });
  }

  __device__ A sum(int slot) {
    A total = 0;
    each_value([&](A value) { total += value; });
    return block_sum(total, slot);
  }

  // The sum of (v - mean)^2.
  __device__ A squares(A mean, int slot) {
    A total = 0;
    each_value([&](A value) { total += (value - mean) * (value - mean); });
    return block_sum(total, slot);
  }
};

// to[i] = what stands where `bits` of the position are flipped: bits 0 to 2 lie inside of a pack, 3 to 7
// across lanes.
template <typename A> __device__ void flip_bits(A (&to)[kPack], const A (&from)[kPack], int bits) {
  const int inside = bits & (kPack - 1), lanes = bits / kPack;
#pragma unroll
  for (int i = 0; i < kPack; ++i) to[i] = from[i ^ inside];
  if (lanes)
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = __shfl_xor_sync(0xffffffffu, to[i], lanes);
}

// One base-4 digit of a rotation (core/quantize_cpu.h: rotate_row): bits b and b + 1 of the position.
template <int kBit, typename A> __device__ void rotate_digit(A (&v)[kPack]) {
  A other[kPack], sum[kPack];
  flip_bits(other, v, 1 << kBit);
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum[i] = v[i] + other[i];
  flip_bits(other, sum, 2 << kBit);
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum[i] += other[i];
  flip_bits(other, v, 3 << kBit);
#pragma unroll
  for (int i = 0; i < kPack; ++i) v[i] = sum[i] * A(0.5) - other[i];
}

// The row v H, groups of `rotation`; all lanes take part, those beyond the row with zeros.
template <typename A, int K, bool kVector>
__device__ void rotate_tile(RowTile<A, K, kVector>& tile, int rotation) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    A(&v)[kPack] = tile.v[k];
    const int at = kPack * int(threadIdx.x + k * blockDim.x);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = at + i < tile.width ? v[i] : A(0);
    rotate_digit<0>(v);
    rotate_digit<2>(v);
    if (rotation >= 64) rotate_digit<4>(v);
    if (rotation >= 256) rotate_digit<6>(v);
  }
}

// Encodes the row in `tile`; `scale` is null where the tensor has one.
template <typename A, int K, bool kVector>
__device__ void quantize_tile(RowTile<A, K, kVector>& tile, const QuantizedRows& q, uint8_t* codes,
                              float* scale, int slot) {
  if (q.rotation) rotate_tile(tile, q.rotation);
  RowScale s{1, 1};
  if (q.tensor_scale) {
    s.inverse = 1 / *q.tensor_scale;
  } else {
    uint32_t amax = 0;
    tile.each_value([&](A value) {
      const uint32_t m = magnitude_bits(float(value));
      amax = m > amax ? m : amax;
    });
    s = row_scale(block_max(amax, slot), q.format);
    if (threadIdx.x == 0) *scale = s.scale;
  }
  tile.each([&](A(&values)[kPack], int at) {
    Pack8<uint8_t> p;
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      p.v[i] = s.finite() ? encode(float(values[i]) * s.inverse, q.format) : uint8_t(0);
    store_pack<kVector>(codes, at, tile.width, p);
  });
}

}  // namespace rfk
