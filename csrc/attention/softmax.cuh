#pragma once

#include "attention/kinds.cuh"
#include "attention/work.cuh"

// Softmax over tiles of keys as they come, in base 2 (Milakov and Gimelshein, 2018). A lane holds, of every
// 16 rows, rows lane / 4 and lane / 4 + 8, of these keys 8 j + 2 (lane % 4) + 0, 1.

namespace rfk {

template <int Pieces, int Keys> using Scores = float[Pieces][Keys / 8][4];
template <int Pieces> using OfRows = float[Pieces][2];

// The largest score so far and the sum of weights relative to it: of the lane's keys alone.
template <int Pieces> struct RowSums {
  OfRows<Pieces> top, sum;
  __device__ RowSums() {
#pragma unroll
    for (int i = 0; i < 2 * Pieces; ++i) top[i / 2][i % 2] = -INFINITY, sum[i / 2][i % 2] = 0;
  }
};

__device__ __forceinline__ float max_of_quad(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float sum_of_quad(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// f(i, h, row) for the lane's rows, `row` counted in the warp
template <int Pieces, typename F> __device__ __forceinline__ void for_rows(F f) {
  const unsigned thread = opaque(threadIdx.x);
#pragma unroll
  for (int i = 0; i < Pieces; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(i, h, 16 * i + 8 * h + int(thread % 32 / 4));
}

// f(j, e, key) for the lane's keys of a tile, `key` counted in it
template <int Keys, typename F> __device__ __forceinline__ void for_keys(F f) {
  const unsigned thread = opaque(threadIdx.x);
#pragma unroll
  for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) f(j, e, 8 * j + 2 * int(thread % 4) + e);
}

// s = s unit + bias log2(e); `bias` points to the tile's first key of the warp's first row
template <typename B, int Keys, int Pieces, typename Unit>
__device__ __forceinline__ void add_bias(Scores<Pieces, Keys>& s, Unit unit, const B* bias, int64_t stride,
                                         int rows, int keys) {
  constexpr float kLog2E = 1.4426950408889634f;
  for_rows<Pieces>([&](int i, int h, int row) {
    const B* const of_lane =
        opaque(bias + std::min(row, rows - 1) * stride + 2 * int(opaque(threadIdx.x) % 4));
    for_keys<Keys>([&](int j, int e, int key) {
      const float b = key < keys ? load(of_lane[8 * j + e]) : 0.0f;
      s[i][j][2 * h + e] = std::fma(s[i][j][2 * h + e], unit(row), b * kLog2E);
    });
  });
}

template <int Keys, int Pieces, typename Unit>
__device__ __forceinline__ void scale_scores(Scores<Pieces, Keys>& s, Unit unit, const AttentionArgs& args,
                                             const Work& w, int warp_row, int tile) {
  const int64_t at = args.bias.at(w.sample, w.head, w.row + warp_row) + tile * Keys;
  const int rows = w.rows - warp_row, keys = w.keys - tile * Keys;
  if (!args.bias.data)
    for_rows<Pieces>([&](int i, int h, int row) {
      for_keys<Keys>([&](int j, int e, int) { s[i][j][2 * h + e] *= unit(row); });
    });
  else if (args.bias.dtype == DType::f32)
    add_bias<float, Keys, Pieces>(s, unit, static_cast<const float*>(args.bias.data) + at, args.bias.row,
                                  rows, keys);
  else if (args.bias.dtype == DType::bf16)
    add_bias<bf16, Keys, Pieces>(s, unit, static_cast<const bf16*>(args.bias.data) + at, args.bias.row, rows,
                                 keys);
  else
    add_bias<f16, Keys, Pieces>(s, unit, static_cast<const f16*>(args.bias.data) + at, args.bias.row, rows,
                                keys);
}

template <int Keys, int Pieces> __device__ __forceinline__ void hide_keys(Scores<Pieces, Keys>& s, int seen) {
  for_keys<Keys>([&](int j, int e, int key) {
#pragma unroll
    for (int i = 0; i < 2 * Pieces; ++i)
      if (key >= seen) s[i / 2][j][2 * (i % 2) + e] = -INFINITY;
  });
}

// Weights in place of the scores of one row, which are in base 2 when multiplied by `unit`. Returns what
// multiplies the sums so far; `added` is what multiplies what the tile adds, where weights are relative to
// its own largest score (u8), and not written elsewhere.
template <typename Kind, int Keys>
__device__ __forceinline__ float exponentiate(float (&s)[Keys / 8][4], int h, float unit, float& row_top,
                                              float& row_sum, float& added) {
  constexpr bool kOwn = Kind::kValues == Values::int8;
  constexpr float kTopLog2 = Kind::kValues == Values::e4m3 ? 8.807354922057604f : 0.0f;
  float top = -INFINITY;
  for_keys<Keys>([&](int j, int e, int) { top = fmaxf(top, s[j][2 * h + e]); });
  top = max_of_quad(top) * unit;
  // A weight of u8 must not exceed 255: the rounding of `top` is made to go up.
  if (kOwn && top > -INFINITY) top = std::fma(std::fabs(top), 0x1p-23f, top);
  const float highest = fmaxf(row_top, top), base = highest > -INFINITY ? highest : 0.0f;
  const float old = exp2_approx(row_top - base);
  row_top = highest;
  const float own = top > -INFINITY ? top : 0.0f, shift = kTopLog2 - (kOwn ? own : base);
  float sum = 0;
  for_keys<Keys>([&](int j, int e, int) {
    float& v = s[j][2 * h + e];
    v = exp2_approx(std::fma(v, unit, shift));
    if constexpr (kOwn) {
      v = std::fma(v, Kind::kTop, kMagic);  // rounded, its code in the last byte
      sum += v - kMagic;
    } else {
      sum += v;
    }
  });
  if constexpr (kOwn) {
    added = exp2_approx(top - base);
    sum *= added;
  }
  row_sum = std::fma(row_sum, old, sum);
  return old;
}

// Weights times the relative factor of their key and row.
template <int Keys, int Pieces>
__device__ __forceinline__ void multiply_factor(Scores<Pieces, Keys>& s, const AttentionArgs& args,
                                                const Work& w, int warp_row, int tile) {
  const int keys = w.keys - tile * Keys;
  const float* const table = static_cast<const float*>(args.factor) + w.head * args.factor_head + args.rows -
                             1 - w.row - warp_row + tile * Keys;
  for_rows<Pieces>([&](int i, int h, int row) {
    const float* const of_lane =
        opaque(table - std::min(row, w.rows - warp_row - 1) + 2 * int(threadIdx.x % 4));
    for_keys<Keys>(
        [&](int j, int e, int key) { s[i][j][2 * h + e] *= key < keys ? of_lane[8 * j + e] : 0.0f; });
  });
}

}  // namespace rfk
