#pragma once

#include "rope/heads.h"

// Loops over one head vector on the CPU, inlined into functions marked RFK_SIMD. Vectors lie in buffers of
// kMaxHeadDim with zeros from d on. They are taken in chunks of kChunk elements: an inner loop of that
// constant length becomes SIMD without a tail, and sums have one order on every instruction set.

namespace rfk::heads_cpu {

inline constexpr int kChunk = 32;  // GCC unrolls shorter loops before it could make SIMD of them
static_assert(kMaxHeadDim % kChunk == 0);

template <typename A> struct alignas(128) Vector {
  A v[kMaxHeadDim] = {};
};

template <typename T> RFK_HD void load_vector(acc_t<T>* x, const T* from, int d) {
  int i = 0;
  for (; i + kChunk <= d; i += kChunk) {
#pragma omp simd
    for (int j = 0; j < kChunk; ++j) x[i + j] = load(from[i + j]);
  }
  for (; i < d; ++i) x[i] = load(from[i]);
}

template <typename T> RFK_HD void store_vector(T* to, const acc_t<T>* x, int d) {
  int i = 0;
  for (; i + kChunk <= d; i += kChunk) {
#pragma omp simd
    for (int j = 0; j < kChunk; ++j) to[i + j] = store<T>(x[i + j]);
  }
  for (; i < d; ++i) to[i] = store<T>(x[i]);
}

// The sum of x y, as 16 sums. Vector types, because GCC keeps an array of sums in memory.
template <typename A> RFK_HD A dot(const A* x, const A* y, int d) {
  typedef A Sixteen __attribute__((vector_size(16 * sizeof(A)), may_alias));
  typedef A Four __attribute__((vector_size(4 * sizeof(A)), may_alias));
  Sixteen sums = {};
  for (int i = 0; i < d; i += 16)
    sums += *reinterpret_cast<const Sixteen*>(x + i) * *reinterpret_cast<const Sixteen*>(y + i);
  const Four* part = reinterpret_cast<const Four*>(&sums);
  const Four total = (part[0] + part[1]) + (part[2] + part[3]);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// A row of the rotation, spread over the elements with the signs in it: a vector is turned by sums of
// products alone. GCC would make fused multiply-adds of neighbours that are a difference and a sum.
template <typename A> struct Row {
  Vector<A> cos, sin;

  RFK_HD void set(const A* row, int d, Turn turn) {
    for (int i = 0; i < d; i += 2) {
      const A s = turn == Turn::back ? -row[i + 1] : row[i + 1];
      cos.v[i] = cos.v[i + 1] = row[i];
      sin.v[i] = -s;
      sin.v[i + 1] = s;
    }
  }
};

template <typename A> RFK_HD void rotate_vector(A* y, const A* x, const Row<A>& row, int d) {
  for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
    for (int j = i; j < i + kChunk; j += 2) {
      y[j] = rotate(x[j], x[j + 1], row.cos.v[j], row.sin.v[j]);
      y[j + 1] = rotate(x[j + 1], x[j], row.cos.v[j + 1], row.sin.v[j + 1]);
    }
  }
}

}  // namespace rfk::heads_cpu
