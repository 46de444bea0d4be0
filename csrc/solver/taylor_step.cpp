#include "solver/taylor_step.h"

#include "core/backend.h"
#include "core/map_rows_cpu.h"
#include "solver/solver.h"

namespace rfk {

void taylor_step(Stream stream, const TensorView& out, const TensorView& x, const TensorView& derivatives,
                 const TensorView& dt) {
  const char* op = "taylor_step";
  check_dense(op, x, {&derivatives, &out});
  check(same_type(out, x), op, ": out must be like x ", x, ", got ", out);
  const int64_t order = derivatives.ndim >= 1 ? derivatives.shape[0] : 0;
  check(1 <= order && order <= kMaxTaylorOrder, op, ": order must be 1..", kMaxTaylorOrder,
        ", got derivatives ", derivatives);
  check(same_shape(derivatives.slice(0), x), op, ": derivatives must be [order, *x.shape] for x ", x,
        ", got ", derivatives);
  check_no_partial_overlap(op, out, x);
  for (int64_t k = 0; k < order; ++k) check_no_partial_overlap(op, out, derivatives.slice(k));
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu) return run_taylor_step(MapRowsCpu{}, out, x, derivatives, dt);
  if constexpr (kWithCuda) return taylor_step_cuda(stream, out, x, derivatives, dt);
  fail_without_cuda(op);
}

}  // namespace rfk
