#pragma once

#include <vector>

#include "core/tensor.h"

// Solver steps: move a state along its trajectory. Each writes `out` and allocates nothing; `out`
// may be one of the inputs. The state is f64, f32, f16 or bf16; the tensors after it have its
// dtype, or are f16 or bf16 beside an f32 state. Row scalars (core/rows.h) have the accumulator's
// dtype: f64 for an f64 state, otherwise f32.

namespace rfk {

// out = a x + b v; a, b: row scalars. Euler (a = 1, b = dt), DDIM, and any other prediction type.
void affine_step(Stream stream, const TensorView& out, const TensorView& x, const TensorView& v,
                 const TensorView& a, const TensorView& b);

// out = sum_k coefs[k] tensors[k], 1..8 tensors; coefs: [K, *rows].
void linear_combination(Stream stream, const TensorView& out, const std::vector<TensorView>& tensors,
                        const TensorView& coefs);

// out = x + sum_k dt^k / k! derivatives[k - 1]; derivatives: [order, *x.shape], order 1..4.
void taylor_step(Stream stream, const TensorView& out, const TensorView& x, const TensorView& derivatives,
                 const TensorView& dt);

// The CUDA half of each step, on tensors that the function above has checked.
void linear_combination_cuda(Stream stream, const TensorView& out, const std::vector<TensorView>& tensors,
                             const TensorView& coefs);
void affine_step_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& v,
                      const TensorView& a, const TensorView& b);
void taylor_step_cuda(Stream stream, const TensorView& out, const TensorView& x,
                      const TensorView& derivatives, const TensorView& dt);

}  // namespace rfk
