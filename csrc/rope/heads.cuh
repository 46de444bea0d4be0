#pragma once

#include <algorithm>

#include "core/map_rows.cuh"
#include "rope/heads.h"

// Head vectors in CUDA: a group of lanes, a power of two, holds a vector, eight neighbours a lane; groups do
// not cross warps. kPacked: every vector can be moved in 16-byte packs, else element by element.

namespace rfk::heads_cuda {

inline constexpr int kThreads = 128, kPack = 8;
inline constexpr int kFullThreads = 256;  // at most, of a block that norms over the full width

// Lanes per vector; those beyond d/8 idle.
inline int lanes_for(int d) {
  int lanes = 1;
  while (lanes * kPack < d) lanes *= 2;
  return lanes;
}

// Threads of a block that takes a token at a time and keeps `kept` vectors of it per group, as far as it can.
inline unsigned full_threads(int64_t heads, int lanes, int kept) {
  const int64_t at_once = 32 / lanes * kept, warps = (heads + at_once - 1) / at_once;
  return 32 * unsigned(std::min<int64_t>(std::max<int64_t>(warps, 2), kFullThreads / 32));
}

// The first element of this lane, and how many it has.
struct Lane {
  int first, count, lanes, group, groups;

  __device__ __forceinline__ Lane(int d, int lanes, int threads = kThreads)
      : first(int(threadIdx.x) % lanes * kPack),
        count(first >= d          ? 0
              : first + kPack > d ? d - first
                                  : kPack),
        lanes(lanes),
        group(int(threadIdx.x) / lanes),
        groups(threads / lanes) {}
};

template <bool kPacked, typename T>
__device__ __forceinline__ Pack<T, kPack> load_pack(const T* from, int count) {
  Pack<T, kPack> pack;
  if constexpr (kPacked) {
    pack = *reinterpret_cast<const Pack<T, kPack>*>(from);
  } else {
#pragma unroll
    for (int j = 0; j < kPack; ++j) pack.v[j] = j < count ? from[j] : T{};
  }
  return pack;
}

template <bool kPacked, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kPack>& pack, int count) {
  if constexpr (kPacked) {
    *reinterpret_cast<Pack<T, kPack>*>(to) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < kPack; ++j)
      if (j < count) to[j] = pack.v[j];
  }
}

// The sum over the lanes of a group; all lanes of the warp meet.
template <typename A> __device__ __forceinline__ A group_sum(A v, int lanes) {
  for (int bits = lanes / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
  return v;
}

// Makes of each v its sum over the block; all threads meet.
template <typename A, int N> __device__ __forceinline__ void block_sum(A (&v)[N]) {
  __shared__ A partial[N][kFullThreads / 32];
  __syncthreads();  // the sums before may still be read
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = group_sum(v[i], 32);
    if (threadIdx.x % 32 == 0) partial[i][threadIdx.x / 32] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = partial[i][0];
    for (int warp = 1; warp < int(blockDim.x / 32); ++warp) v[i] += partial[i][warp];
  }
}

// Turns the pairs of x by the angles at `row`, of this lane.
template <bool kPacked, typename A>
__device__ __forceinline__ void rotate_pack(A (&x)[kPack], const A* row, int count, Turn turn) {
  const Pack<A, kPack> angles = load_pack<kPacked>(row, count);
#pragma unroll
  for (int j = 0; j < kPack; j += 2) {
    const A a = x[j], b = x[j + 1], sin = turn == Turn::back ? -angles.v[j + 1] : angles.v[j + 1];
    x[j] = rotate(a, b, angles.v[j], -sin);
    x[j + 1] = rotate(b, a, angles.v[j], sin);
  }
}

// Vector i of those of tokens `begin`, begin + 1, ... of a part, the heads of a token side by side.
struct VectorIndex {
  int64_t b, l;
  int h;

  __device__ __forceinline__ VectorIndex(const HeadPart& part, int64_t b0, int64_t l0, unsigned i)
      : b(b0), l(l0 + i / unsigned(part.heads)), h(int(i % unsigned(part.heads))) {
    while (l >= part.length) l -= part.length, ++b;
  }
};

inline bool fits_packs(const Heads& h, int64_t size) {
  return (uintptr_t(h.data) | uintptr_t(h.sample * size) | uintptr_t(h.token * size) |
          uintptr_t(h.head * size)) %
             16 ==
         0;
}

inline bool fits_packs(const HeadPlan& plan) {
  const int64_t acc = size_of(acc_of(plan.tokens)), size = size_of(plan.tokens);
  bool fits = plan.d % kPack == 0 && uintptr_t(plan.rotation) % 16 == 0 &&
              plan.rotation_sample * acc % 16 == 0 && plan.rotation_token * acc % 16 == 0;
  for (int i = 0; i < plan.parts; ++i) {
    const HeadPart& p = plan.part[i];
    fits = fits && fits_packs(p.x, size) && fits_packs(p.y, size) && fits_packs(p.dx, size) &&
           uintptr_t(p.weight) % 16 == 0;
  }
  return fits;
}

}  // namespace rfk::heads_cuda
