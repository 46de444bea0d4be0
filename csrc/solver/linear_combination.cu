#include "solver/linear_combination.h"

#include "core/map_rows.cuh"
#include "solver/solver.h"

namespace rfk {

void linear_combination_cuda(Stream stream, const TensorView& out, const std::vector<TensorView>& tensors,
                             const TensorView& coefs) {
  run_linear_combination(MapRowsCuda{cudaStream_t(stream), out.device.index}, out, tensors, coefs);
}

}  // namespace rfk
