#pragma once

#include <optional>
#include <string>

#include "activation/activation_maps.h"
#include "core/activation.h"
#include "core/check.h"

namespace rfk {

inline void check_tokens(const char* op, const char* name, const TensorView& x) {
  check(x.ndim >= 1, op, ": ", name, " must be [*lead, width], got ", x);
  check(x.dtype <= DType::bf16, op, ": ", name, " must be f64, f32, f16 or bf16, got ", x);
}

inline void check_bias(const char* op, const char* name, const std::optional<TensorView>& bias,
                       const TensorView& x, int64_t width) {
  if (!bias) return;
  const bool dtype = bias->dtype == x.dtype || (bias->dtype == DType::f32 && size_of(x.dtype) == 2);
  check(dtype && bias->has_shape({width}) && bias->ndim == 1 && bias->device == x.device &&
            bias->is_contiguous(),
        op, ": ", name, " must be [", width, "] without gaps on the device of x ", x,
        ", of its dtype or f32 beside 16 bits, got ", *bias);
}

inline void check_names(const char* op, const std::string& kind, const std::string& tier) {
  dispatch_activation(op, kind, [](auto) {});
  check(tier == "fast" || tier == "exact", op, ": tier must be fast or exact, got ", tier);
}

// Checks gate and up of a call, packed or apart; returns the shape and dtype of one half.
inline TensorView check_gate_and_up(const char* op, const TensorView& x, const std::optional<TensorView>& up,
                                    const std::optional<TensorView>& bias,
                                    const std::optional<TensorView>& up_bias, const std::string& kind,
                                    const std::string& tier) {
  check_tokens(op, "x", x);
  const int64_t width = x.shape[x.ndim - 1];
  check(up || width % 2 == 0, op, ": x must hold two halves along its last axis, or up be given; got ", x);
  check(!up || same_type(*up, x), op, ": up must be like x ", x, ", got ", up.value_or(x));
  check(up || !up_bias, op, ": one bias of both halves goes with one packed x, got two");
  check_bias(op, "bias", bias, x, width);
  check_bias(op, "the bias of up", up_bias, x, width);
  check_names(op, kind, tier);
  return up ? x : half_of(x, 0);
}

}  // namespace rfk
