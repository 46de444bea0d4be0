#pragma once

#include <optional>
#include <string>

#include "core/tensor.h"

// Counter-based noise: element i of sample b is a pure function of (seed, sample, step, i), so it
// depends neither on the batch around the sample nor on the device. Both back ends give the same bits.

namespace rfk {

// out ~ N(0, 1). keys: i64[batch, 3], rows (seed, sample, step); out: [batch, ...].
void philox_normal(Stream stream, const TensorView& out, const TensorView& keys);

// out = k x + c z, z as philox_normal gives it; k, c: row scalars. `out` may be x.
void renoise(Stream stream, const TensorView& out, const TensorView& x, const TensorView& k,
             const TensorView& c, const TensorView& keys);

// out = s floor(x / (s c) + u), s the step at x / c of grid: bf16, f16, e4m3, e5m2 (u8), int8 (-127..127) or
// uint8; u = k 2^-24 from 24 bits keyed by (seed, element). x f32; scale: c, a row scalar, absent: 1. Codes
// saturate, a NaN is 0 in int8 and uint8; beyond the range of 16 bits a cast to nearest.
void stochastic_round(Stream stream, const TensorView& out, const TensorView& x,
                      const std::optional<TensorView>& scale, int64_t seed, const std::string& grid);

// The CUDA half of each, on tensors that the function above has checked.
void philox_normal_cuda(Stream stream, const TensorView& out, const TensorView& keys);
void renoise_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& k,
                  const TensorView& c, const TensorView& keys);
void stochastic_round_cuda(Stream stream, const TensorView& out, const TensorView& x,
                           const std::optional<TensorView>& scale, int64_t seed, const std::string& grid);

}  // namespace rfk
