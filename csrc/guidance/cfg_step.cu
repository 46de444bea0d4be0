#include "guidance/cfg_step.h"

#include "core/map_rows.cuh"
#include "guidance/guidance.h"

namespace rfk {

void cfg_step_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& uncond,
                   const TensorView& cond, const TensorView& guidance, const TensorView& a,
                   const TensorView& b) {
  const MapRowsCuda map_rows{cudaStream_t(stream), x.device.index};
  run_cfg_step(map_rows, out, x, uncond, cond, guidance, a, b);
}

}  // namespace rfk
