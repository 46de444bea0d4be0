#pragma once

#include <optional>
#include <string>

#include "core/tensor.h"

// The regions between the linear layers of a transformer block: formulas in ada_norm.h. Tokens are [*lead,
// width], f64, f32, f16 or bf16, neighbours along the last axis adjacent, the leading axes through any
// strides. Parameters have their dtype, or are f32 beside 16-bit tokens: weight and bias [width]; scale,
// shift and gate [*lead', width], lead' leading axes of x, each as long or 1, or [groups, width] where index,
// i64 or i32 [*lead'], says which row serves a token. An index out of range is an error on the CPU and makes
// NaN on CUDA. Widths of CUDA tensors are at most 32768, 24576 where rows are not aligned (f64: 8192). norm:
// "layer", "rms", "none"; gate_activation: "none", "tanh"; tier: "fast", "exact", "exact_before_weight".
// Codes are i8, or u8 for e4m3, with a scale per row (core/quantize.h), or, e4m3 alone, one that is given.

namespace rfk {

using Optional = std::optional<TensorView>;

// out = (N(x) weight + bias) (1 + scale) + shift
void norm_modulate(Stream stream, const TensorView& out, const TensorView& x, const Optional& scale,
                   const Optional& shift, const Optional& index, const Optional& weight, const Optional& bias,
                   const std::string& norm, double eps, const std::string& tier);

// x_out = x + act(gate) branch_weight N(y)
void gated_residual(Stream stream, const TensorView& x_out, const TensorView& x, const TensorView& y,
                    const Optional& gate, const Optional& index, const std::string& gate_activation,
                    const std::string& branch_norm, const Optional& branch_weight, double eps,
                    const std::string& tier);

// Both: x_out as gated_residual, out = norm_modulate of x_out.
void gated_residual_norm_modulate(Stream stream, const TensorView& x_out, const TensorView& out,
                                  const TensorView& x, const TensorView& y, const Optional& gate,
                                  const Optional& scale, const Optional& shift, const Optional& index,
                                  const std::string& gate_activation, const std::string& branch_norm,
                                  const Optional& branch_weight, const Optional& weight, const Optional& bias,
                                  const std::string& norm, double eps, const std::string& tier);

// The same two with their last result quantised.
void norm_modulate_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                            const TensorView& x, const Optional& scale, const Optional& shift,
                            const Optional& index, const Optional& weight, const Optional& bias,
                            const std::string& norm, double eps, const std::string& tier,
                            const Optional& tensor_scale, int64_t rotation);
void gated_residual_norm_modulate_quantize(Stream stream, const TensorView& x_out, const TensorView& codes,
                                           const TensorView& scales, const TensorView& x, const TensorView& y,
                                           const Optional& gate, const Optional& scale, const Optional& shift,
                                           const Optional& index, const std::string& gate_activation,
                                           const std::string& branch_norm, const Optional& branch_weight,
                                           const Optional& weight, const Optional& bias,
                                           const std::string& norm, double eps, const std::string& tier,
                                           const Optional& tensor_scale, int64_t rotation);

// The gradients of a norm and of a gate (ada_norm_backward.h): dv, and the sums that those of the parameters
// are made of.
void ada_norm_backward(Stream stream, const TensorView& dv, const TensorView& sums, const TensorView& dy,
                       const TensorView& v, const Optional& add, const Optional& weight,
                       const Optional& table, const Optional& index, const Optional& order,
                       const Optional& begins, int64_t groups, int64_t splits, bool wants_sums,
                       const std::string& norm, const std::string& act, double eps);
struct AdaNormBackwardCall;
void ada_norm_backward_cpu(const AdaNormBackwardCall& call);
void ada_norm_backward_cuda(Stream stream, const AdaNormBackwardCall& call);

// The two halves of all others, on a call that has been checked.
struct AdaNormCall;
void ada_norm_cpu(const AdaNormCall& call);
void ada_norm_cuda(Stream stream, const AdaNormCall& call);

}  // namespace rfk
