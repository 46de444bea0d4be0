#pragma once

#include <string>

#include "core/tensor.h"

namespace rfk::test {

// y = function(x) of core/math.h or core/activation.h: exp, tanh, sigmoid, cdf, density, sine, cosine.
// y, x: f32[n] or f64[n] (sine and cosine: f32).
void math(Stream stream, const TensorView& y, const TensorView& x, const std::string& function);

// y = activate_grad(kind, x); y, x: f32[n] or f64[n].
void activation_grad(Stream stream, const TensorView& y, const TensorView& x, const std::string& kind);

}  // namespace rfk::test
