#pragma once

#include <algorithm>
#include <string>

#include "core/activation.h"
#include "linear/gguf.h"
#include "linear/linear.h"

namespace rfk {

// How a weight is stored.
enum class Storage : uint8_t { floating, int8, e4m3, int4, gguf };

// How `weight` [n, .] is stored beside x [., k]; four-bit codes lie two a byte.
inline Storage storage_of(const TensorView& weight, int64_t k) {
  if (is_floating(weight.dtype)) return Storage::floating;
  if (weight.dtype == DType::i8) return Storage::int8;
  return k > 0 && weight.shape[1] * 2 == k ? Storage::int4 : Storage::e4m3;
}

// What the epilogue applies to the sum.
enum class Epilogue : uint8_t { none, relu, gelu, gelu_tanh, silu, relu2 };

inline Epilogue epilogue_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "relu2"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  check(found != std::end(kNames), "linear",
        ": activation must be none, relu, gelu, gelu_tanh, silu or relu2, got ", name);
  return Epilogue(found - kNames);
}

template <typename A> RFK_HD A apply(Epilogue kind, A v) {
  switch (kind) {
    case Epilogue::none: return v;
    case Epilogue::relu: return v < 0 ? A(0) : v;  // NaN stays
    case Epilogue::gelu: return activate(Activation::gelu, v);
    case Epilogue::gelu_tanh: return activate(Activation::gelu_tanh, v);
    case Epilogue::silu: return activate(Activation::silu, v);
    case Epilogue::relu2: return activate(Activation::relu2, v);
  }
  return v;
}

// A code of `v / scale`, saturated; NaN becomes 0
RFK_HD int8_t saturated_code(float scaled) {
  const float bounded = scaled > 127 ? 127.0f : scaled > -127 ? scaled : scaled == scaled ? -127.0f : 0.0f;
  return int8_t(int32_t(std::nearbyint(bounded)));
}

// A checked call. All views are 2-d or 1-d with neighbours along the last axis adjacent; only rows of x, out
// and residual may be strided.
struct LinearCall {
  TensorView out, x, weight;
  Optional x_scale, weight_scale, weight_zero, bias, hidden, up, gate, residual, out_scale, workspace;
  Epilogue epilogue = Epilogue::none;
  Storage storage = Storage::floating;
  Gguf gguf{};  // of blocks
  int64_t m = 0, n = 0, k = 0, rank = 0;
  int64_t groups = 1;          // of weight_scale and weight_zero along k
  bool scale_per_row = false;  // weight_scale has one number per output (or more), not one in all

  int64_t group() const { return groups > 0 ? k / groups : 0; }
  int64_t rows_per_gate() const { return gate ? m / gate->shape[0] : 1; }
};

// Fills in what follows from the tensors of a call, whose x and weight have two axes.
inline void read_shapes(LinearCall& c) {
  c.m = c.x.shape[0];
  c.k = c.x.shape[1];
  c.n = c.weight.shape[0];
  const Optional& branch = c.hidden ? c.hidden : c.up;
  c.rank = branch && branch->ndim == 2 ? branch->shape[1] : 0;
  c.storage = storage_of(c.weight, c.k);
  if (!c.weight_scale) return;
  const bool grouped = c.storage == Storage::int4 && c.weight_scale->ndim == 2;
  c.groups = grouped ? c.weight_scale->shape[1] : 1;
  c.scale_per_row = grouped || c.weight_scale->numel() != 1 || c.n == 1;
}

void linear_cpu(const LinearCall& call);
void linear_cuda(Stream stream, const LinearCall& call);

void dequantize_gguf_cpu(const TensorView& out, const TensorView& blocks, Gguf kind);
void dequantize_gguf_cuda(Stream stream, const TensorView& out, const TensorView& blocks, Gguf kind);

}  // namespace rfk
