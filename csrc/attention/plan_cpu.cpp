#include "attention/plan_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rfk {

AttentionPlan plan_attention(const AttentionCall& c) {
  const bool automatic = c.precision == Precision::automatic;
  AttentionPlan p{PanelLayout(products_of(c, true), c.d, automatic),
                  PanelLayout(products_of(c, false), c.d, false),
                  c.eight_bits(),
                  !c.eight_bits() || automatic,
                  1,
                  0,
                  0};
#ifdef _OPENMP
  p.threads = omp_get_max_threads();
#endif
  // Tasks of eight tiles of rows read a tile of keys often enough; smaller ones where threads would wait.
  const int64_t rows = c.packed() ? ceil_div(c.rows, c.sequences) : c.rows;
  const int64_t tiles = c.sequences * c.heads * ceil_div(rows, kMostRows);
  const int64_t per_task = std::clamp<int64_t>(tiles / (4 * p.threads), 1, 8);
  p.rows_per_task = c.block_mask ? kBlockRows : per_task * kMostRows;
  const int64_t all = c.packed() ? c.kv_heads * p.head(c.keys + c.sequences * kWeightKeys)
                                 : c.sequences * c.kv_heads * p.head(c.keys);
  p.region = std::min(all, std::max(p.head(c.keys), AttentionPlan::kRegion));
  return p;
}

int64_t attention_workspace_cpu(const AttentionCall& call) {
  int64_t most = 0;
  AttentionCall c = call;
  for (const bool factor : {false, true}) {  // which changes the sizes, as a block mask does
    if (factor) c.factor = c.q;
    AttentionPlan p = plan_attention(c);
    p.rows_per_task = std::max(p.rows_per_task, kBlockRows);
    most = std::max(most, p.workspace());
  }
  return most;
}

}  // namespace rfk
