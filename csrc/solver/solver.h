#pragma once

#include <optional>
#include <string>
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

// out_j = sum_k c_jk y_k + c_jg g + c_jz z for one to three results, in one pass: g is guided by `guide`
// (empty: none, no such column) with parameters `guidance`, [params] or [params, batch]; z is normal noise of
// `keys`. coefs: [outputs, columns, *rows]; where there is a mask m the coefficients are coefs + m (inside -
// coefs). step: i64[], the row of a first axis that coefs, inside and guidance then have; it is added to the
// step of the keys. tensors[0] gives the dtype of the results; the others are f64 beside f64, else f32, f16
// or bf16.
void combine(Stream stream, const TensorView& out, const std::vector<TensorView>& more_outs,
             const std::vector<TensorView>& tensors, const TensorView& coefs,
             const std::optional<TensorView>& mask, const std::optional<TensorView>& inside,
             const std::optional<TensorView>& keys, const std::optional<TensorView>& step,
             const std::string& guide, const std::optional<TensorView>& guidance,
             const std::optional<TensorView>& workspace);

// out f64[batch, J + J (J + 1) / 2]: per sample sums of J combinations, coefs [J, tensors, *rows], then of
// their products, in the order of an upper triangle.
void moments(Stream stream, const TensorView& out, const std::vector<TensorView>& tensors,
             const TensorView& coefs, const TensorView& workspace);

// out = sum_k c_k y_k + c_z z, and sums f64[batch, 2]: per sample those of out, as it is stored, less
// sum_k c_k y_k, and of its squares: the bits of moments. coefs: [1, tensors + 1, *rows].
void stochastic_step(Stream stream, const TensorView& out, const TensorView& sums,
                     const std::vector<TensorView>& tensors, const TensorView& coefs, const TensorView& keys,
                     const TensorView& workspace);

// The bytes of workspace that moments and stochastic_step need, and combine for guides with products over a
// sample.
int64_t combine_workspace(const TensorView& x);

// The CUDA half of each step, on tensors that the function above has checked.
void linear_combination_cuda(Stream stream, const TensorView& out, const std::vector<TensorView>& tensors,
                             const TensorView& coefs);
void affine_step_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& v,
                      const TensorView& a, const TensorView& b);
void taylor_step_cuda(Stream stream, const TensorView& out, const TensorView& x,
                      const TensorView& derivatives, const TensorView& dt);

}  // namespace rfk
