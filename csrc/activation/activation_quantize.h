#pragma once

#include "activation/activation_maps.h"
#include "core/quantize.h"

namespace rfk {

// The tensors of a call: act(x + bias), or with `gated` act(gate + bias) (up + up_bias), as codes.
struct ActivationQuantizeCall {
  const char* op;
  TensorView codes, scales, x;
  bool gated;
  std::optional<TensorView> up, bias, up_bias;
  std::string kind;
  bool gate_first;
  std::string tier;
  std::optional<TensorView> tensor_scale;
  int64_t rotation;
};

inline ActivationQuantizeCall activation_quantize_call(const TensorView& codes, const TensorView& scales,
                                                       const TensorView& x,
                                                       const std::optional<TensorView>& bias,
                                                       const std::string& kind, const std::string& tier,
                                                       const std::optional<TensorView>& tensor_scale,
                                                       int64_t rotation) {
  return {"activation_quantize", codes,   scales, x, false, {}, bias, {}, kind, true, tier,
          tensor_scale,          rotation};
}

inline ActivationQuantizeCall gated_activation_quantize_call(
    const TensorView& codes, const TensorView& scales, const TensorView& x,
    const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
    const std::optional<TensorView>& up_bias, const std::string& kind, bool gate_first,
    const std::string& tier, const std::optional<TensorView>& tensor_scale, int64_t rotation) {
  return {"gated_activation_quantize",
          codes,
          scales,
          x,
          true,
          up,
          bias,
          up_bias,
          kind,
          gate_first,
          tier,
          tensor_scale,
          rotation};
}

// Its rows: `in` gets the inputs, the result says where the codes go.
struct QuantizePlan {
  RowPlan plan;
  RowArg in[2];
  QuantizedRows quantized;
};

inline QuantizePlan plan_quantize(const ActivationQuantizeCall& c) {
  QuantizePlan p;
  const GateAndUp halves = c.gated ? GateAndUp(c.x, c.up, c.gate_first) : GateAndUp(c.x, c.x, true);
  RowArg args[] = {
      {"x", halves.gate, 1}, {"up", halves.up, 1}, {"codes", c.codes, 1}, {"scales", c.scales, 0}};
  p.plan = plan_vectors(c.op, c.codes, std::span(args, c.tensor_scale ? 3 : 4));
  p.in[0] = args[0];
  p.in[1] = args[1];
  p.quantized.codes = args[2].vectors<uint8_t>();
  if (!c.tensor_scale) p.quantized.scales = args[3].vectors<float>();
  p.quantized.tensor_scale = c.tensor_scale ? c.tensor_scale->ptr<float>() : nullptr;
  p.quantized.format = c.codes.dtype == DType::u8 ? Codes::e4m3 : Codes::int8;
  p.quantized.rotation = int(c.rotation);
  return p;
}

// Calls f(vectors, op) with the arrays of the call for the op, which is plain or gated.
template <typename T, typename Plain, typename Gated, typename F>
void with_vectors(const ActivationQuantizeCall& c, const QuantizePlan& p, Plain plain, Gated gated, F&& f) {
  if (!c.gated) {
    return f(Vectors<T, Plain>{{p.in[0].vectors<const T>()}, {column_param(c.bias)}, {}}, plain);
  }
  Vectors<T, Gated> vectors{{p.in[0].vectors<const T>(), p.in[1].vectors<const T>()}, {}, {}};
  set_biases(vectors.param, c.up, c.bias, c.up_bias, c.gate_first);
  f(vectors, gated);
}

}  // namespace rfk
