#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

// Mixtures of experts: which experts a row goes to, their products, and the sum of their results.

namespace rfk {

using Optional = std::optional<TensorView>;

inline constexpr int kMaxExperts = 64;

// Softmax over the experts and the top k of every row, and the choices sorted by expert.
//
// logits [rows, experts], floating; rows may be strided. weights f32 (f64 beside f64 logits) and experts i32,
// [rows, k]; offsets i32 [experts + 1]; order and slots i32 [rows k], [rows, k], inverse to each other.
// (rfkernels/ops/moe.py)
void moe_route(Stream stream, const TensorView& weights, const TensorView& experts, const TensorView& offsets,
               const TensorView& order, const TensorView& slots, const TensorView& logits,
               const std::optional<int64_t>& capacity, bool normalize,
               const std::optional<double>& threshold);

// out[s] = x[index[s]] W_e^T + b_e for offsets[e] <= s < offsets[e + 1]; with `up`
// silu(x W_e^T + b_e) (x U_e^T + c_e); zero behind offsets[experts].
//
// x [rows, in] may be strided, out [slots, out]; weights and up: `experts` tensors [out, in], bias and
// up_bias as many [out] or none; all contiguous and of the dtype of x. offsets i32 [experts + 1]; index i32
// [slots], a row of it beyond x makes NaN; without it slots = rows.
void grouped_linear(Stream stream, const TensorView& out, const TensorView& x,
                    const std::vector<TensorView>& weights, const TensorView& offsets, const Optional& index,
                    const std::vector<TensorView>& up, const std::vector<TensorView>& bias,
                    const std::vector<TensorView>& up_bias, const Optional& workspace);

// The bytes of workspace (u8, any alignment) that `grouped_linear` needs for `slots` rows; on CUDA none.
int64_t grouped_linear_workspace(const TensorView& x, const std::vector<TensorView>& weights, int64_t slots,
                                 bool gated);

// out[row] = residual[row] + sum_j weights[row, j] y[slots[row, j]], from left to right; slots from
// offsets[experts] on add nothing. y [slots, width], out and residual [rows, width] like y.
void moe_combine(Stream stream, const TensorView& out, const TensorView& y, const TensorView& weights,
                 const TensorView& slots, const TensorView& offsets, const Optional& residual);

// The CUDA halves, on tensors that the functions above have checked.
void moe_route_cuda(Stream stream, const TensorView& weights, const TensorView& experts,
                    const TensorView& offsets, const TensorView& order, const TensorView& slots,
                    const TensorView& logits, const std::optional<int64_t>& capacity, bool normalize,
                    const std::optional<double>& threshold);
void moe_combine_cuda(Stream stream, const TensorView& out, const TensorView& y, const TensorView& weights,
                      const TensorView& slots, const TensorView& offsets, const Optional& residual);

}  // namespace rfk
