#include "solver/taylor_step.h"

#include "core/map_rows.cuh"
#include "solver/solver.h"

namespace rfk {

void taylor_step_cuda(Stream stream, const TensorView& out, const TensorView& x,
                      const TensorView& derivatives, const TensorView& dt) {
  run_taylor_step(MapRowsCuda{cudaStream_t(stream), x.device.index}, out, x, derivatives, dt);
}

}  // namespace rfk
