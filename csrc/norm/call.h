#pragma once

#include "core/check.h"
#include "core/dispatch.h"
#include "norm/ada_norm.h"
#include "norm/norm.h"

// The tensors of a call of the room's ops, and how AdaNorm is made of them.

namespace rfk {

struct AdaNormCall {
  const char* op;
  TensorView x;
  // the gated residual
  Optional x_out, y, gate, branch_weight;
  bool tanh = false;
  Norm branch_norm = Norm::none;
  // norm and modulation
  Optional out, scale, shift, weight, bias;
  Norm norm = Norm::none;
  Optional index;
  double eps = 0;
  Tier tier = Tier::fast;
  // instead of `out`
  Optional codes, scales, tensor_scale;
  int64_t rotation = 0;
};

inline Norm parse_norm(const char* op, const char* argument, const std::string& name) {
  if (name == "none") return Norm::none;
  if (name == "layer") return Norm::layer;
  if (name == "rms") return Norm::rms;
  fail(op, ": ", argument, " must be 'layer', 'rms' or 'none', got '", name, "'");
}

inline Tier parse_tier(const char* op, const std::string& name) {
  if (name == "fast") return Tier::fast;
  if (name == "exact") return Tier::exact;
  if (name == "exact_before_weight") return Tier::exact_before_weight;
  fail(op, ": tier must be 'fast', 'exact' or 'exact_before_weight', got '", name, "'");
}

inline bool parse_gate_activation(const char* op, const std::string& name) {
  check(name == "none" || name == "tanh", op, ": gate_activation must be 'none' or 'tanh', got '", name, "'");
  return name == "tanh";
}

inline AdaNormCall norm_modulate_call(const char* op, const TensorView& x, const Optional& scale,
                                      const Optional& shift, const Optional& index, const Optional& weight,
                                      const Optional& bias, const std::string& norm, double eps,
                                      const std::string& tier) {
  AdaNormCall c;
  c.op = op;
  c.x = x;
  c.scale = scale;
  c.shift = shift;
  c.weight = weight;
  c.bias = bias;
  c.norm = parse_norm(op, "norm", norm);
  c.index = index;
  c.eps = eps;
  c.tier = parse_tier(op, tier);
  return c;
}

inline void add_residual(AdaNormCall& c, const TensorView& x_out, const TensorView& y, const Optional& gate,
                         const std::string& gate_activation, const std::string& branch_norm,
                         const Optional& branch_weight) {
  c.x_out = x_out;
  c.y = y;
  c.gate = gate;
  c.branch_weight = branch_weight;
  c.tanh = parse_gate_activation(c.op, gate_activation);
  c.branch_norm = parse_norm(c.op, "branch_norm", branch_norm);
}

inline void add_codes(AdaNormCall& c, const TensorView& codes, const TensorView& scales,
                      const Optional& tensor_scale, int64_t rotation) {
  c.codes = codes;
  c.scales = scales;
  c.tensor_scale = tensor_scale;
  c.rotation = rotation;
}

// The dtype of the parameters: that of those that are given, or of the tokens.
inline DType parameter_dtype(const AdaNormCall& c) {
  for (const Optional* t : {&c.gate, &c.scale, &c.shift, &c.weight, &c.bias, &c.branch_weight})
    if (*t) return (*t)->dtype;
  return c.x.dtype;
}

// Calls f.operator()<T, M>() for tokens of type T and parameters of type M: equal, or f32 beside 16-bit
// tokens.
template <typename F> void dispatch_tokens(const char* op, const TensorView& x, DType parameters, F&& f) {
  if (parameters == x.dtype)
    return dispatch_float(op, x.dtype, [&]<typename T>() { f.template operator()<T, T>(); });
  if (x.dtype == DType::bf16 && parameters == DType::f32) return f.template operator()<bf16, float>();
  if (x.dtype == DType::f16 && parameters == DType::f32) return f.template operator()<f16, float>();
  fail(op, ": expected parameters of the dtype of x, or f32 beside f16 or bf16, got ", name_of(parameters),
       " with x ", x);
}

template <typename T> T* data_of(const Optional& t) { return t ? t->ptr<T>() : nullptr; }

// Runs a checked call; `backend` is a back end.
template <typename Backend> void run_ada_norm(const Backend& backend, const AdaNormCall& c) {
  enum { kX, kXOut, kY, kOut, kGate, kScale, kShift, kIndex, kCodes, kScales, kCount };
  const Optional* tensors[kCount] = {nullptr,  &c.x_out, &c.y,     &c.out,   &c.gate,
                                     &c.scale, &c.shift, &c.index, &c.codes, &c.scales};
  const char* names[kCount] = {"x",     "x_out", "y",     "out",   "gate",
                               "scale", "shift", "index", "codes", "scales"};
  RowArg args[kCount];
  int at[kCount], count = 0;
  for (int i = 0; i < kCount; ++i) {
    const bool table = i == kGate || i == kScale || i == kShift;
    at[i] = -1;
    if (i != kX && (!*tensors[i] || (table && c.index) || (i == kScales && c.tensor_scale))) continue;
    at[i] = count;
    args[count++] = {names[i], i == kX ? c.x : **tensors[i], i == kIndex || i == kScales ? 0 : 1};
  }
  if (c.x.numel() == 0) return;
  const RowPlan plan = plan_vectors(c.op, c.x, std::span(args, count));

  dispatch_tokens(c.op, c.x, parameter_dtype(c), [&]<typename T, typename M>() {
    AdaNorm<T, M> op;
    op.name = c.op;
    op.plan = plan;
    op.tanh = c.tanh;
    op.tier = c.tier;
    op.eps = acc_t<T>(c.eps);
    const auto vectors = [&]<typename U>(RowVectors<U>& to, int i) {
      if (at[i] >= 0) {
        to = args[at[i]].template vectors<U>();
      } else if (i < kIndex && i != kX && *tensors[i]) {  // a table that an index reads
        to.data = (*tensors[i])->template ptr<U>();
        to.stride[0] = (*tensors[i])->stride[0];
      }
    };
    vectors(op.x, kX);
    vectors(op.x_out, kXOut);
    vectors(op.y, kY);
    vectors(op.out, kOut);
    vectors(op.gate, kGate);
    vectors(op.scale, kScale);
    vectors(op.shift, kShift);
    vectors(op.quantized.codes, kCodes);
    vectors(op.quantized.scales, kScales);
    if (c.index) {
      const Optional& table = c.scale ? c.scale : c.shift ? c.shift : c.gate;
      op.index = {c.index->data, {}, c.index->dtype == DType::i64, table ? table->shape[0] : INT64_MAX};
      std::copy(args[at[kIndex]].stride, args[at[kIndex]].stride + kRowAxes, op.index.stride);
    }
    op.branch_weight = data_of<M>(c.branch_weight);
    op.weight = data_of<M>(c.weight);
    op.bias = data_of<M>(c.bias);
    op.branch_norm = c.branch_norm;
    op.norm = c.norm;
    op.quantized.tensor_scale = data_of<float>(c.tensor_scale);
    op.quantized.format = c.codes && c.codes->dtype == DType::u8 ? Codes::e4m3 : Codes::int8;
    op.quantized.rotation = int(c.rotation);
    backend(op);
  });
}

}  // namespace rfk
