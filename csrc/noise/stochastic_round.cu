#include "noise/stochastic_round.h"

#include "noise/noise.h"
#include "noise/noise_rows.cuh"

namespace rfk {

void stochastic_round_cuda(Stream stream, const TensorView& out, const TensorView& x,
                           const std::optional<TensorView>& scale, int64_t seed, const std::string& grid) {
  run_stochastic_round(NoiseRowsCuda{cudaStream_t(stream), x.device.index}, out, x, scale, seed, grid);
}

}  // namespace rfk
