#pragma once

#include <optional>
#include <string>

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

}  // namespace rfk
