#pragma once

#include <algorithm>
#include <cstdint>

#include "core/map_rows.h"
#include "core/stream_store.h"

namespace rfk {

enum class Write { through_cache, past_cache };

// out[i] = f(in[i]) for begin <= i < end.
template <typename T, typename V, typename Op>
RFK_SIMD void map_span(T* out, Inputs<T, V, Op::kInputs> in, int64_t begin, int64_t end, RowPlan plan, Op op,
                       Write write) {
  // Elements between two bursts of streaming stores: few, so that memory is read while it is written.
  constexpr int64_t kStrip = 256;
  alignas(64) T buffer[kStrip];
  typename Op::Row f{};
  int64_t row_end = begin;
  for (int64_t strip = begin; strip < end; strip += kStrip) {
    const int64_t strip_end = std::min(strip + kStrip, end);
    T* const to = write == Write::past_cache ? buffer : out + strip;
    for (int64_t start = strip; start < strip_end;) {
      if (start == row_end) {
        const int64_t row = start / plan.cols;
        f = op.row(plan.index(row));
        row_end = (row + 1) * plan.cols;
      }
      const int64_t stop = std::min(strip_end, row_end);
#pragma omp simd
      for (int64_t i = start; i < stop; ++i) {
        acc_t<T> v[Op::kInputs];
        v[0] = load(in.first[i]);
        for (int j = 1; j < Op::kInputs; ++j) v[j] = load(in.rest[j - 1][i]);
        to[i - strip] = store<T>(f(v));
      }
      start = stop;
    }
    if (write == Write::past_cache) stream_store(out + strip, buffer, (strip_end - strip) * sizeof(T));
  }
  if (write == Write::past_cache) stream_fence();
}

// The CPU back end of map_rows: threads over blocks of elements, SIMD within a block.
struct MapRowsCpu {
  template <typename T, typename V, typename Op>
  void operator()(T* out, const Inputs<T, V, Op::kInputs>& in, const RowPlan& plan, Op op) const {
    constexpr int64_t kBlock = 4096;  // elements per task: outweighs the fork
    const int64_t total = plan.rows * plan.cols, blocks = (total + kBlock - 1) / kBlock;
    bool in_place = out == in.first;
    for (int j = 1; j < Op::kInputs; ++j) in_place |= static_cast<const void*>(out) == in.rest[j - 1];
    const bool past = !in_place && should_stream(out, total * sizeof(T));
    const Write write = past ? Write::past_cache : Write::through_cache;

#pragma omp parallel for schedule(static) if (total > 8 * kBlock)
    for (int64_t block = 0; block < blocks; ++block)
      map_span<T, V, Op>(out, in, block * kBlock, std::min((block + 1) * kBlock, total), plan, op, write);
  }
};

}  // namespace rfk
