#include "solver/affine_step.h"

#include "core/map_rows.cuh"
#include "solver/solver.h"

namespace rfk {

void affine_step_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& v,
                      const TensorView& a, const TensorView& b) {
  run_affine_step(MapRowsCuda{cudaStream_t(stream), x.device.index}, out, x, v, a, b);
}

}  // namespace rfk
