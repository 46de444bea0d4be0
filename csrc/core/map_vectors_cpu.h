#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/map_vectors.h"

namespace rfk {

// Columns at a time: what stays in the innermost cache between conversion and arithmetic.
inline constexpr int64_t kVectorStrip = 256;

// `count` values from `from` on as A, in `buffer` where they are of another type.
template <typename A, typename T> RFK_HD const A* widen(A* buffer, const T* from, int64_t count) {
  if constexpr (std::is_same_v<A, T>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = load(from[i]);
    return buffer;
  }
}

// The parameters of `count` columns from `begin` on; `absent`: a strip of what absent ones read as.
template <typename A>
RFK_HD const A* widen_columns(A* buffer, ColumnParam param, int64_t begin, int64_t count, const A* absent) {
  if (!param.data) return absent;
  if (param.dtype == DType::bf16) return widen(buffer, static_cast<const bf16*>(param.data) + begin, count);
  if (param.dtype == DType::f16) return widen(buffer, static_cast<const f16*>(param.data) + begin, count);
  return static_cast<const A*>(param.data) + begin;
}

// Columns begin .. end of the row at `index`, strip by strip, to out_j[begin] on; U is T, or A for results
// that are not rounded yet. Three loops a strip where types differ: GCC makes full-width SIMD of conversions,
// and of arithmetic, not of both in one.
template <typename T, typename U, typename Op>
RFK_HD void map_columns(const Vectors<T, Op>& vectors, RowIndex index, int64_t begin, int64_t end, Op op,
                        U* const (&out)[Op::kOutputs]) {
  using A = acc_t<T>;
  constexpr bool kWiden = !std::is_same_v<T, A>, kNarrow = !std::is_same_v<U, A>;
  alignas(64) A wide_in[kWiden ? Op::kInputs : 1][kVectorStrip], wide_param[Op::kParams][kVectorStrip];
  alignas(64) A wide_out[kNarrow ? Op::kOutputs : 1][kVectorStrip], absent[kVectorStrip];
  const T* from[Op::kInputs];
  for (int j = 0; j < Op::kInputs; ++j) from[j] = vectors.in[j].at(index);
  for (A& a : absent) a = A(-0.0);

  for (int64_t strip = begin; strip < end; strip += kVectorStrip) {
    const int64_t count = std::min(kVectorStrip, end - strip);
    const A *in[Op::kInputs], *param[Op::kParams];
    A* result[Op::kOutputs];
    for (int j = 0; j < Op::kInputs; ++j) in[j] = widen(wide_in[kWiden ? j : 0], from[j] + strip, count);
    for (int j = 0; j < Op::kParams; ++j)
      param[j] = widen_columns<A>(wide_param[j], vectors.param[j], strip, count, absent);
    for (int j = 0; j < Op::kOutputs; ++j) {
      if constexpr (kNarrow)
        result[j] = wide_out[j];
      else
        result[j] = out[j] + strip;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      A v[Op::kInputs], p[Op::kParams], f[Op::kOutputs];
      for (int j = 0; j < Op::kInputs; ++j) v[j] = in[j][i];
      for (int j = 0; j < Op::kParams; ++j) p[j] = param[j][i];
      op(v, p, f);
      for (int j = 0; j < Op::kOutputs; ++j) result[j][i] = f[j];
    }
    if constexpr (kNarrow) {
      for (int j = 0; j < Op::kOutputs; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[j][strip + i] = store<U>(wide_out[j][i]);
      }
    }
  }
}

template <typename T, typename Op>
RFK_SIMD void map_run(const Vectors<T, Op>& vectors, RowIndex index, int64_t begin, int64_t end, Op op) {
  T* out[Op::kOutputs];
  for (int j = 0; j < Op::kOutputs; ++j) out[j] = vectors.out[j].at(index);
  map_columns<T, T>(vectors, index, begin, end, op, out);
}

// The CPU back end of map_vectors: threads over blocks of elements, SIMD along a row. Ordinary stores: with
// as much arithmetic as an activation has, streaming ones (map_rows_cpu.h) were slower by a fifth.
struct MapVectorsCpu {
  template <typename T, typename Op>
  void operator()(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op) const {
    constexpr int64_t kBlock = 4096;  // elements per task: outweighs the fork
    const int64_t total = plan.rows * plan.cols, blocks = (total + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (total > 2 * kBlock)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = std::min((block + 1) * kBlock, total);
      map_block(plan, vectors, op, block * kBlock, end);
    }
  }

 private:
  // Elements begin .. end, counted along the rows.
  template <typename T, typename Op>
  static void map_block(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op, int64_t begin,
                        int64_t end) {
    while (begin < end) {
      const int64_t row = begin / plan.cols, column = begin % plan.cols;
      const int64_t count = std::min(plan.cols - column, end - begin);
      map_run<T, Op>(vectors, plan.index(row), column, column + count, op);
      begin += count;
    }
  }
};

}  // namespace rfk
