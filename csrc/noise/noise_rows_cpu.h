#pragma once

#include <algorithm>

#include "noise/noise_rows.h"

namespace rfk {

inline constexpr int kNoiseBlocks = 256;  // Philox blocks per task: 1,024 draws, 4 KB

// What `count` blocks from `first` on draw, in order.
template <typename Draw> RFK_SIMD void fill_draws(const NoiseKey& key, int64_t first, int count, Draw* z) {
  Draw lanes[kDrawsPerBlock][kNoiseBlocks];
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    Draw v[kDrawsPerBlock];
    draw(key, uint64_t(first + j), v);
    for (int l = 0; l < kDrawsPerBlock; ++l) lanes[l][j] = v[l];
  }
  for (int j = 0; j < count; ++j)
    for (int l = 0; l < kDrawsPerBlock; ++l) z[kDrawsPerBlock * j + l] = lanes[l][j];
}

// out[i] = f(i, z[i - begin]) for begin <= i < end, indices in the whole tensor.
template <typename T, typename Op>
RFK_SIMD void apply_noise(T* out, const typename Op::Draw* z, int64_t begin, int64_t end, RowPlan plan,
                          Op op) {
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / plan.cols, stop = std::min(end, (row + 1) * plan.cols);
    const typename Op::Row f = op.row(plan.index(row));
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) out[i] = f(i, z[i - begin]);
    start = stop;
  }
}

// The CPU back end of noise_rows: threads over blocks of a sample, SIMD within a block.
struct NoiseRowsCpu {
  template <typename T, typename Keys, typename Op>
  void operator()(T* out, Keys keys, const NoiseShape& shape, Op op) const {
    constexpr int64_t kTask = kNoiseBlocks * kDrawsPerBlock;
    const int64_t tasks = (shape.size + kTask - 1) / kTask;

#pragma omp parallel for schedule(static) if (shape.samples * shape.size > 8 * kTask)
    for (int64_t task = 0; task < shape.samples * tasks; ++task) {
      const int64_t sample = task / tasks, start = task % tasks * kTask;
      const int64_t count = std::min(kTask, shape.size - start), begin = sample * shape.size + start;
      typename Op::Draw z[kTask];
      fill_draws(keys.of(sample), start / kDrawsPerBlock, int((count + kDrawsPerBlock - 1) / kDrawsPerBlock),
                 z);
      apply_noise<T, Op>(out, z, begin, begin + count, shape.plan, op);
    }
  }
};

}  // namespace rfk
