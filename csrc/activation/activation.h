#pragma once

#include <optional>
#include <string>

#include "core/tensor.h"

// Activation functions of feed-forward layers, with the bias of the linear layer before them, and the gated
// form act(gate) up. Each writes `out` and allocates nothing; `out` may be one of the inputs. Tensors are
// f64, f32, f16 or bf16, [*lead, width] with any strides along `lead` and none along `width`. Biases have the
// dtype of x, or are f32 beside 16 bits. kind: core/activation.h. tier: "fast" rounds once; "exact" rounds to
// the dtype of x after the bias, after the function and after the product, as eager torch does.

namespace rfk {

// out = act(x + bias); bias: [width].
void activation(Stream stream, const TensorView& out, const TensorView& x,
                const std::optional<TensorView>& bias, const std::string& kind, const std::string& tier);

// out = grad act'(x + bias)
void activation_backward(Stream stream, const TensorView& out, const TensorView& grad, const TensorView& x,
                         const std::optional<TensorView>& bias, const std::string& kind);

// out = act(gate + gate_bias) (up + up_bias). Packed: x [*lead, 2 width] holds gate and up (gate_first) or up
// and gate, bias [2 width] alike. Apart: x is the gate, beside it `up`, bias and up_bias: [width].
void gated_activation(Stream stream, const TensorView& out, const TensorView& x,
                      const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
                      const std::optional<TensorView>& up_bias, const std::string& kind, bool gate_first,
                      const std::string& tier);

// The gradients of gate and up, packed: out [*lead, 2 width], in the order of x; apart: gate, up.
void gated_activation_backward(Stream stream, const TensorView& out, const TensorView& grad,
                               const TensorView& x, const std::optional<TensorView>& up,
                               const std::optional<TensorView>& bias,
                               const std::optional<TensorView>& up_bias, const std::string& kind,
                               bool gate_first);

// The two forms as codes of eight bits and their scales (core/quantize.h): codes i8, or u8 for e4m3; scales
// f32, one a row, or a tensor_scale that is given. Widths of CUDA tensors are at most 20480 (f64: 5120).
void activation_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                         const TensorView& x, const std::optional<TensorView>& bias, const std::string& kind,
                         const std::string& tier, const std::optional<TensorView>& tensor_scale,
                         int64_t rotation);
void gated_activation_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                               const TensorView& x, const std::optional<TensorView>& up,
                               const std::optional<TensorView>& bias,
                               const std::optional<TensorView>& up_bias, const std::string& kind,
                               bool gate_first, const std::string& tier,
                               const std::optional<TensorView>& tensor_scale, int64_t rotation);
struct ActivationQuantizeCall;
void activation_quantize_call_cuda(Stream stream, const ActivationQuantizeCall& call);

// The CUDA half of each op, on tensors that the function above has checked.
void activation_cuda(Stream stream, const TensorView& out, const TensorView& x,
                     const std::optional<TensorView>& bias, const std::string& kind, const std::string& tier);
void activation_backward_cuda(Stream stream, const TensorView& out, const TensorView& grad,
                              const TensorView& x, const std::optional<TensorView>& bias,
                              const std::string& kind);
void gated_activation_cuda(Stream stream, const TensorView& out, const TensorView& x,
                           const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
                           const std::optional<TensorView>& up_bias, const std::string& kind, bool gate_first,
                           const std::string& tier);
void gated_activation_backward_cuda(Stream stream, const TensorView& out, const TensorView& grad,
                                    const TensorView& x, const std::optional<TensorView>& up,
                                    const std::optional<TensorView>& bias,
                                    const std::optional<TensorView>& up_bias, const std::string& kind,
                                    bool gate_first);

}  // namespace rfk
