#pragma once

#include <algorithm>

#include "core/launch.cuh"
#include "linear/args.h"

// From the sums of a call to its result, N neighbours of a row at a time, in A = float or double. What a
// table holds is known at run time only: a branch that all threads take alike.

namespace rfk {

template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) LinearPack {
  T v[N];
};

template <typename A> __device__ A number_at(const Table& t, int64_t at) {
  switch (t.dtype) {
    case DType::f64:
      if constexpr (sizeof(A) == 8) return static_cast<const double*>(t.data)[at];
      return A(0);
    case DType::f32: return static_cast<const float*>(t.data)[at];
    case DType::f16: return load(static_cast<const f16*>(t.data)[at]);
    case DType::bf16: return load(static_cast<const bf16*>(t.data)[at]);
    default: return A(static_cast<const uint8_t*>(t.data)[at]);
  }
}

template <typename T, typename A, int N>
__device__ __forceinline__ void load_numbers(A (&v)[N], const void* data, int64_t at) {
  const auto pack = *reinterpret_cast<const LinearPack<T, N>*>(static_cast<const T*>(data) + at);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = A(load(pack.v[i]));
}

// v = the numbers from `at` on; the first `count` of them where they are not read in pieces, the others 0.
template <typename A, int N>
__device__ __forceinline__ void load_numbers(A (&v)[N], const Table& t, int64_t at, int count, bool pieces) {
  if (!pieces) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = i < count ? number_at<A>(t, at + i) : A(0);
  } else if (t.dtype == DType::f32) {
    load_numbers<float>(v, t.data, at);
  } else if (t.dtype == DType::bf16) {
    load_numbers<bf16>(v, t.data, at);
  } else if (t.dtype == DType::f16) {
    load_numbers<f16>(v, t.data, at);
  } else if constexpr (sizeof(A) == 8) {
    load_numbers<double>(v, t.data, at);
  }
}

template <typename T, typename A, int N>
__device__ __forceinline__ void store_numbers(const Table& t, int64_t at, const A (&v)[N], int count,
                                              bool pieces) {
  T* const to = static_cast<T*>(const_cast<void*>(t.data)) + at;
  LinearPack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (std::is_same_v<T, int8_t>)
      pack.v[i] = saturated_code(float(v[i]));
    else
      pack.v[i] = store<T>(acc_t<T>(v[i]));
  }
  if (pieces) {
    *reinterpret_cast<LinearPack<T, N>*>(to) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = pack.v[i];
  }
}

// out[row, column ..] = what the epilogue makes of the sums v
template <typename A, int N>
__device__ __forceinline__ void finish(A (&v)[N], const LinearArgs& args, int row, int column) {
  const int count = args.n - column;
  if (row >= args.m || count <= 0) return;
  const bool pieces = args.pieces;
  A other[N];
  if (args.bias.data) {
    load_numbers(other, args.bias, column, count, pieces);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += other[i];
  }
  if (args.epilogue != Epilogue::none)
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = apply(args.epilogue, v[i]);
  if (args.gate.data) {
    load_numbers(other, args.gate, unsigned(row) / args.rows_per_gate * args.gate.stride + column, count,
                 pieces);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= other[i];
  }
  if (args.residual.data) {
    load_numbers(other, args.residual, row * args.residual.stride + column, count, pieces);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += other[i];
  }
  const int64_t at = row * args.out.stride + column;
  if (args.out.dtype == DType::i8) {
    const A scale = number_at<A>(args.out_scale, 0);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] / scale;
    store_numbers<int8_t>(args.out, at, v, count, pieces);
  } else if (args.out.dtype == DType::f32) {
    store_numbers<float>(args.out, at, v, count, pieces);
  } else if (args.out.dtype == DType::bf16) {
    store_numbers<bf16>(args.out, at, v, count, pieces);
  } else if (args.out.dtype == DType::f16) {
    store_numbers<f16>(args.out, at, v, count, pieces);
  } else if constexpr (sizeof(A) == 8) {
    store_numbers<double>(args.out, at, v, count, pieces);
  }
}

// values[index], with `index` known at run time and `values` in registers
template <typename A, int N, int Size>
__device__ __forceinline__ void pick(A (&to)[Size], const A (&values)[N][Size], int index) {
#pragma unroll
  for (int e = 0; e < Size; ++e) to[e] = values[0][e];
#pragma unroll
  for (int i = 1; i < N; ++i)
#pragma unroll
    for (int e = 0; e < Size; ++e) to[e] = index == i ? values[i][e] : to[e];
}

// What multiplies the sum of a column, if that is the place of weight_scale.
template <typename A> __device__ A column_scale(const LinearArgs& args, int column) {
  if (!args.column_scale || !args.weight_scale.data || column >= args.n) return A(1);
  return number_at<A>(args.weight_scale, args.scale_per_row ? column : 0);
}

template <typename A> __device__ A row_scale_of(const LinearArgs& args, int row) {
  if (!args.x_scale.data || row >= args.m) return A(1);
  return number_at<A>(args.x_scale, row);
}

}  // namespace rfk
