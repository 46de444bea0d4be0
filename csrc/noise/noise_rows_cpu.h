#pragma once

#include <algorithm>

#include "noise/noise_rows.h"

namespace rfk {

inline constexpr int kNoiseBlocks = 256;  // Philox blocks per task: 1,024 normals, 4 KB

// The four words of each of `count` blocks from `first` on, then their normals in order.
RFK_SIMD inline void fill_normals(const NoiseKey& key, int64_t first, int count, float* z) {
  float lanes[kNormalsPerBlock][kNoiseBlocks];
#pragma omp simd
  for (int j = 0; j < count; ++j) {
    float v[kNormalsPerBlock];
    normals(key, uint64_t(first + j), v);
    for (int l = 0; l < kNormalsPerBlock; ++l) lanes[l][j] = v[l];
  }
  for (int j = 0; j < count; ++j)
    for (int l = 0; l < kNormalsPerBlock; ++l) z[kNormalsPerBlock * j + l] = lanes[l][j];
}

// out[i] = f(i, z[i - begin]) for begin <= i < end, indices in the whole tensor.
template <typename T, typename Op>
RFK_SIMD void apply_noise(T* out, const float* z, int64_t begin, int64_t end, RowPlan plan, Op op) {
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / plan.cols, stop = std::min(end, (row + 1) * plan.cols);
    const typename Op::Row f = op.row(plan.index(row));
#pragma omp simd
    for (int64_t i = start; i < stop; ++i) out[i] = store<T>(f(i, z[i - begin]));
    start = stop;
  }
}

// The CPU back end of noise_rows: threads over blocks of a sample, SIMD within a block.
struct NoiseRowsCpu {
  template <typename T, typename Op>
  void operator()(T* out, NoiseKeys keys, const NoiseShape& shape, Op op) const {
    constexpr int64_t kTask = kNoiseBlocks * kNormalsPerBlock;
    const int64_t tasks = (shape.size + kTask - 1) / kTask;

#pragma omp parallel for schedule(static) if (shape.samples * shape.size > 8 * kTask)
    for (int64_t task = 0; task < shape.samples * tasks; ++task) {
      const int64_t sample = task / tasks, start = task % tasks * kTask;
      const int64_t count = std::min(kTask, shape.size - start), begin = sample * shape.size + start;
      float z[kTask];
      fill_normals(keys.of(sample), start / kNormalsPerBlock,
                   int((count + kNormalsPerBlock - 1) / kNormalsPerBlock), z);
      apply_noise<T, Op>(out, z, begin, begin + count, shape.plan, op);
    }
  }
};

}  // namespace rfk
