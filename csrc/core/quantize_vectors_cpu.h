#pragma once

#include <omp.h>

#include <memory>

#include "core/map_vectors_cpu.h"
#include "core/quantize_cpu.h"

namespace rfk {

template <typename T, typename Op>
RFK_SIMD void quantize_map_rows(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op,
                                const QuantizedRows& q, bool exact, int64_t begin, int64_t end,
                                acc_t<T>* row_values) {
  const bool past_cache = streams(q.codes, plan.axes, plan.rows, plan.cols);
  for (int64_t row = begin; row < end; ++row) {
    const RowIndex at = plan.index(row);
    acc_t<T>* const result[1] = {row_values};
    map_columns<T, acc_t<T>>(vectors, at, 0, plan.cols, op, result);
    if (exact)
#pragma omp simd
      for (int64_t c = 0; c < plan.cols; ++c) row_values[c] = rounded_to<T>(row_values[c]);
    quantize_row(q, q.codes.at(at), q.scales.data ? q.scales.at(at) : nullptr, row_values, plan.cols,
                 past_cache);
  }
  stream_fence();
}

// map_vectors (core/map_vectors.h) of one result, which is quantised: threads over rows. `exact`: of what
// would have been stored.
struct QuantizeVectorsCpu {
  QuantizedRows quantized;
  bool exact;

  template <typename T, typename Op>
  void operator()(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op) const {
    static_assert(Op::kOutputs == 1);
#pragma omp parallel if (plan.rows > 1 && plan.rows * plan.cols > (1 << 14))
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const std::unique_ptr<acc_t<T>[]> values(new acc_t<T>[plan.cols]);
      quantize_map_rows<T, Op>(plan, vectors, op, quantized, exact, plan.rows * thread / threads,
                               plan.rows * (thread + 1) / threads, values.get());
    }
  }
};

}  // namespace rfk
