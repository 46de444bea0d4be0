#pragma once

#include <algorithm>
#include <cstdint>

#include "core/map_rows.h"
#include "core/stream_store.h"

namespace rfk {

// out[i - begin] = f(in[i]) for begin <= i < end.
template <typename T, typename V, typename Op>
RFK_SIMD void map_span(T* out, Inputs<T, V, Op::kInputs> in, int64_t begin, int64_t end, RowPlan plan,
                       Op op) {
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / plan.cols, stop = std::min(end, (row + 1) * plan.cols);
    const typename Op::Row f = op.row(plan.index(row));
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) {
      acc_t<T> v[Op::kInputs];
      v[0] = load(in.first[i]);
      for (int j = 1; j < Op::kInputs; ++j) v[j] = load(in.rest[j - 1][i]);
      out[i - begin] = store<T>(f(v));
    }
    start = stop;
  }
}

// The CPU back end of map_rows: threads over blocks of elements, SIMD within a block.
struct MapRowsCpu {
  template <typename T, typename V, typename Op>
  void operator()(T* out, const Inputs<T, V, Op::kInputs>& in, const RowPlan& plan, Op op) const {
    constexpr int64_t kBlock = 4096;  // elements per task: outweighs the fork, fits in L1
    const int64_t total = plan.rows * plan.cols, blocks = (total + kBlock - 1) / kBlock;
    bool in_place = out == in.first;
    for (int j = 1; j < Op::kInputs; ++j) in_place |= static_cast<const void*>(out) == in.rest[j - 1];
    const bool stream = !in_place && should_stream(out, total * sizeof(T));

#pragma omp parallel for schedule(static) if (total > 8 * kBlock)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, total);
      if (!stream) {
        map_span<T, V, Op>(out + begin, in, begin, end, plan, op);
        continue;
      }
      alignas(64) T buffer[kBlock];
      map_span<T, V, Op>(buffer, in, begin, end, plan, op);
      stream_store(out + begin, buffer, (end - begin) * sizeof(T));
    }
  }
};

}  // namespace rfk
