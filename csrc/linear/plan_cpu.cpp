#include "linear/plan_cpu.h"

#include "core/threads.h"

namespace rfk {
LinearPlan plan_linear(const LinearCall& c) {
  const int64_t m = c.m, n = c.n, k = c.k;
  const DType x = c.x.dtype;
  LinearPlan p{};
  p.product = product_of(x, c.weight.dtype);
  const DType hidden = x == DType::f32 || x == DType::f16 ? DType::f32 : DType::bf16;  // rounded to
  p.branch = p.product == Product::f64 ? Product::f64 : product_of(hidden, c.up ? c.up->dtype : DType::f32);
  const bool blocks = c.group() >= 8 && k % 128 == 0 && (128 % c.group() == 0 || c.group() % 128 == 0);
  p.four = m <= 8 && c.storage == Storage::int4 && x == DType::bf16 && p.product == Product::bf16 && blocks &&
           tiles().int4;
  p.shape = m <= kTileRows[kTile4x32] || p.four ? kTile4x32
            : n <= kTileColumns[kTile24x16]     ? kTile24x16
                                                : kTile12x32;
  p.rows = kTileRows[p.shape];
  p.columns = kTileColumns[p.shape];
  p.threads = threads_for(m * n * k);
  p.groups = c.groups;
  p.input_sums = c.weight_zero && c.weight_zero->dtype != DType::u8;
  p.steps = ceil_div(k, numbers_of(p.product));
  p.branch_steps = ceil_div(c.rank, numbers_of(p.branch));
  const DType numbers[] = {DType::i8, DType::bf16, DType::f32, DType::f64};
  constexpr int64_t kFew = 24, kNarrow = 64;  // rows, columns for which panels cost more than they gain
  p.direct = (m <= kFew || n <= kNarrow) && x == c.weight.dtype && x == numbers[int(p.product)] &&
             tiles().direct_of(p.product, p.shape);
  p.row_tiles = ceil_div(m, p.rows);
  p.panels = ceil_div(n, p.columns);

  constexpr int64_t kPanelBytes = 384 << 10;  // of the second cache, beside a tile of x
  const int64_t fit = std::clamp<int64_t>(kPanelBytes / std::max<int64_t>(p.panel(), 1), 1, 8);
  p.panels_per_task = std::clamp<int64_t>(ceil_div(p.panels, p.threads), 1, fit);
  p.column_tasks = ceil_div(p.panels, p.panels_per_task);
  p.row_tasks = 1;
  if (p.column_tasks < 2 * p.threads && p.threads > 1)  // then some panels are made more than once
    p.row_tasks = std::clamp<int64_t>(2 * p.threads / std::max<int64_t>(p.column_tasks, 1), 1,
                                      std::max<int64_t>(ceil_div(p.row_tiles, 8), 1));
  return p;
}

}  // namespace rfk
