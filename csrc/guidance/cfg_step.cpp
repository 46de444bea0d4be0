#include "guidance/cfg_step.h"

#include "core/backend.h"
#include "core/map_rows_cpu.h"
#include "guidance/guidance.h"

namespace rfk {

void cfg_step(Stream stream, const TensorView& out, const TensorView& x, const TensorView& uncond,
              const TensorView& cond, const TensorView& guidance, const TensorView& a, const TensorView& b) {
  const char* op = "cfg_step";
  check_dense(op, x, {&uncond, &cond, &out});
  check(same_type(out, x), op, ": out must be like x ", x, ", got ", out);
  check(same_shape(uncond, x), op, ": uncond must have the shape of x ", x, ", got ", uncond);
  check(same_type(cond, uncond), op, ": cond must be like uncond ", uncond, ", got ", cond);
  for (const TensorView* input : {&x, &uncond, &cond}) check_no_partial_overlap(op, out, *input);
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu)
    return run_cfg_step(MapRowsCpu{}, out, x, uncond, cond, guidance, a, b);
  if constexpr (kWithCuda) return cfg_step_cuda(stream, out, x, uncond, cond, guidance, a, b);
  fail_without_cuda(op);
}

}  // namespace rfk
