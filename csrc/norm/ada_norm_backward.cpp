#include "norm/ada_norm_backward.h"

#include "norm/ada_norm_cpu.h"

namespace rfk {
namespace {

template <typename A> struct BackwardScratch {
  std::unique_ptr<A[]> memory;
  A *n, *g, *factor;
  const void* filled = nullptr;
  bool valid = false;

  explicit BackwardScratch(int64_t cols)
      : memory(new A[3 * cols]), n(memory.get()), g(n + cols), factor(g + cols) {}
};

template <typename T, typename M>
RFK_HD void fill_factor(const AdaNormBackward<T, M>& op, const M* table, BackwardScratch<acc_t<T>>& s) {
  using A = acc_t<T>;
  if (s.valid && s.filled == table) return;
  for (int64_t c = 0; c < op.plan.cols; ++c) {
    const A w = op.weight ? A(load(op.weight[c])) : A(1);
    s.factor[c] = table ? w * op.factor(load(table[c])) : w;
  }
  s.filled = table;
  s.valid = true;
}

template <typename T, typename M>
RFK_SIMD void backward_task(const AdaNormBackward<T, M>& op, int64_t group, int64_t split,
                            BackwardScratch<acc_t<T>>& s) {
  using A = acc_t<T>;
  const int64_t cols = op.plan.cols;
  A* const sums = op.sums_of(group, split);
  if (sums) std::fill(sums, sums + 2 * cols, A(0));
  A *const n = s.n, *const g = s.g, *const factor = s.factor;
  const auto task = op.task(group, split);
  for (int64_t place = task.begin; place < task.end; ++place) {
    const RowIndex at = op.row(place);
    fill_factor(op, op.table_of(at), s);
    const T *v = op.v.at(at), *dy = op.dy.at(at);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) n[c] = load(v[c]);
    const Moments<A> m = moments_of(n, cols, op.norm, op.eps);
    A sum_g = 0, sum_gn = 0;
#pragma omp simd reduction(+ : sum_g, sum_gn)
    for (int64_t c = 0; c < cols; ++c) {
      n[c] = (n[c] - m.mean) * m.rstd;
      g[c] = factor[c] * load(dy[c]);
      sum_g += g[c];
      sum_gn += g[c] * n[c];
    }
    if (sums)
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        sums[c] += load(dy[c]) * n[c];
        sums[cols + c] += load(dy[c]);
      }
    const A mean_g = op.norm == Norm::layer ? sum_g / A(cols) : 0,
            mean_gn = op.norm == Norm::none ? 0 : sum_gn / A(cols);
    T* const dv = op.dv.at(at);
    if (op.add.data) {
      const T* add = op.add.at(at);
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c)
        dv[c] = store<T>(m.rstd * (g[c] - mean_g - n[c] * mean_gn) + load(add[c]));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) dv[c] = store<T>(m.rstd * (g[c] - mean_g - n[c] * mean_gn));
    }
  }
}

struct BackwardCpu {
  template <typename T, typename M> void operator()(const AdaNormBackward<T, M>& op) const {
#pragma omp parallel if (op.plan.rows * op.plan.cols > (1 << 14))
    {
      BackwardScratch<acc_t<T>> scratch(op.plan.cols);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < op.groups * op.splits; ++task)
        backward_task(op, task / op.splits, task % op.splits, scratch);
    }
  }
};

}  // namespace

void ada_norm_backward_cpu(const AdaNormBackwardCall& call) { run_ada_norm_backward(BackwardCpu{}, call); }

}  // namespace rfk
