#pragma once

#include "core/tensor.h"

// Counter-based noise: element i of sample b is a pure function of (seed, sample, step, i), so it
// depends neither on the batch around the sample nor on the device. Both back ends give the same bits.

namespace rfk {

// out ~ N(0, 1). keys: i64[batch, 3], rows (seed, sample, step); out: [batch, ...].
void philox_normal(Stream stream, const TensorView& out, const TensorView& keys);

// out = k x + c z, z as philox_normal gives it; k, c: row scalars. `out` may be x.
void renoise(Stream stream, const TensorView& out, const TensorView& x, const TensorView& k,
             const TensorView& c, const TensorView& keys);

// The CUDA half of each, on tensors that the function above has checked.
void philox_normal_cuda(Stream stream, const TensorView& out, const TensorView& keys);
void renoise_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& k,
                  const TensorView& c, const TensorView& keys);

}  // namespace rfk
