#include "solver/affine_step.h"

#include "core/backend.h"
#include "core/map_rows_cpu.h"
#include "solver/solver.h"

namespace rfk {

void affine_step(Stream stream, const TensorView& out, const TensorView& x, const TensorView& v,
                 const TensorView& a, const TensorView& b) {
  const char* op = "affine_step";
  check_dense(op, x, {&v, &out});
  check(same_type(out, x), op, ": out must be like x ", x, ", got ", out);
  check(same_shape(v, x), op, ": v must have the shape of x ", x, ", got ", v);
  check_no_partial_overlap(op, out, x);
  check_no_partial_overlap(op, out, v);
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu) return run_affine_step(MapRowsCpu{}, out, x, v, a, b);
  if constexpr (kWithCuda) return affine_step_cuda(stream, out, x, v, a, b);
  fail_without_cuda(op);
}

}  // namespace rfk
