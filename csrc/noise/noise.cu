#include "noise/noise.h"

#include "noise/noise_rows.cuh"

namespace rfk {

void philox_normal_cuda(Stream stream, const TensorView& out, const TensorView& keys) {
  run_philox_normal(NoiseRowsCuda{cudaStream_t(stream), out.device.index}, out, keys);
}

void renoise_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& k,
                  const TensorView& c, const TensorView& keys) {
  run_renoise(NoiseRowsCuda{cudaStream_t(stream), x.device.index}, out, x, k, c, keys);
}

}  // namespace rfk
