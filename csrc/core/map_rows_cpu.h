#pragma once

#include <algorithm>
#include <cstdint>

#include "core/map_rows.h"
#include "core/stream_store.h"

namespace rfk {

// Elements between two rounds of prefetching, and how far ahead: the conversions of 16-bit types fill
// the reorder window before enough loads are in flight (bf16 from memory: 1.45 to 2 times faster so).
inline constexpr int64_t kStrip = 256, kAhead = 2048;

template <typename T> RFK_HD void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i);
}

// out[i - begin] = f(in[i]) for begin <= i < end.
template <typename T, typename V, typename Op>
RFK_SIMD void map_span(T* out, Inputs<T, V, Op::kInputs> in, int64_t begin, int64_t end, RowPlan plan,
                       Op op) {
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / plan.cols, stop = std::min(end, (row + 1) * plan.cols);
    const typename Op::Row f = op.row(plan.index(row));
    for (int64_t strip = start; strip < stop; strip += kStrip) {
      const int64_t strip_end = std::min(strip + kStrip, stop);
      prefetch(in.first + strip + kAhead, strip_end - strip);
      for (int j = 1; j < Op::kInputs; ++j) prefetch(in.rest[j - 1] + strip + kAhead, strip_end - strip);
#pragma omp simd
      for (int64_t i = strip; i < strip_end; ++i) {
        acc_t<T> v[Op::kInputs];
        v[0] = load(in.first[i]);
        for (int j = 1; j < Op::kInputs; ++j) v[j] = load(in.rest[j - 1][i]);
        out[i - begin] = store<T>(f(v));
      }
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
