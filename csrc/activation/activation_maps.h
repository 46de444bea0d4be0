#pragma once

#include <optional>
#include <string>

#include "core/activation.h"
#include "core/dispatch.h"
#include "core/map_vectors.h"

namespace rfk {

// `x` as it is when it has been stored as a T, if the tier asks for it.
template <bool Exact, typename T> RFK_HD acc_t<T> rounded(acc_t<T> x) {
  if constexpr (Exact) return load(store<T>(x));
  return x;
}

// act(x + b)
template <typename T, typename K, bool Exact> struct Activate {
  using A = acc_t<T>;
  static constexpr int kInputs = 1, kParams = 1, kOutputs = 1;

  RFK_HD void operator()(const A (&in)[1], const A (&bias)[1], A (&out)[1]) const {
    out[0] = activate(K(), rounded<Exact, T>(in[0] + bias[0]));
  }
};

// grad act'(x + b), of inputs grad, x
template <typename T, typename K> struct ActivateBackward {
  using A = acc_t<T>;
  static constexpr int kInputs = 2, kParams = 1, kOutputs = 1;

  RFK_HD void operator()(const A (&in)[2], const A (&bias)[1], A (&out)[1]) const {
    out[0] = in[0] * activate_grad(K(), in[1] + bias[0]);
  }
};

// act(gate + b) (up + c)
template <typename T, typename K, bool Exact> struct GatedActivate {
  using A = acc_t<T>;
  static constexpr int kInputs = 2, kParams = 2, kOutputs = 1;

  RFK_HD void operator()(const A (&in)[2], const A (&bias)[2], A (&out)[1]) const {
    const A gate = rounded<Exact, T>(in[0] + bias[0]), up = rounded<Exact, T>(in[1] + bias[1]);
    out[0] = rounded<Exact, T>(activate(K(), gate)) * up;
  }
};

// The gradients of gate and up, of inputs grad, gate, up
template <typename T, typename K> struct GatedActivateBackward {
  using A = acc_t<T>;
  static constexpr int kInputs = 3, kParams = 2, kOutputs = 2;

  RFK_HD void operator()(const A (&in)[3], const A (&bias)[2], A (&out)[2]) const {
    const A gate = in[1] + bias[0];
    out[0] = in[0] * (in[2] + bias[1]) * activate_grad(K(), gate);
    out[1] = in[0] * activate(K(), gate);
  }
};

// Half `i` of a packed tensor along its last axis.
inline TensorView half_of(TensorView packed, int i) {
  int64_t& width = packed.shape[packed.ndim - 1];
  width /= 2;
  packed.data = packed.ptr<char>() + i * width * size_of(packed.dtype);
  return packed;
}

// Gate and up of a call, packed or apart.
struct GateAndUp {
  TensorView gate, up;

  GateAndUp(const TensorView& x, const std::optional<TensorView>& up, bool gate_first)
      : gate(up ? x : half_of(x, gate_first ? 0 : 1)), up(up ? *up : half_of(x, gate_first ? 1 : 0)) {}
};

inline ColumnParam column_param(const std::optional<TensorView>& t) {
  return t ? ColumnParam{t->data, t->dtype} : ColumnParam{};
}

// The biases of gate and up.
inline void set_biases(ColumnParam (&param)[2], const std::optional<TensorView>& up,
                       const std::optional<TensorView>& bias, const std::optional<TensorView>& up_bias,
                       bool gate_first) {
  if (!up && bias) {
    const GateAndUp halves(*bias, std::nullopt, gate_first);
    param[0] = column_param(halves.gate), param[1] = column_param(halves.up);
  } else {
    param[0] = column_param(bias), param[1] = column_param(up_bias);
  }
}

// Calls f.operator()<T, K, Exact>(); no intermediate result of 32 or 64 bits loses anything when it is
// stored.
template <typename F>
void dispatch_tier(const char* op, DType dtype, const std::string& kind, const std::string& tier, F&& f) {
  dispatch_float(op, dtype, [&]<typename T>() {
    dispatch_activation(op, kind, [&]<typename K>(K) {
      if constexpr (sizeof(T) == 2) {
        if (tier == "exact") return f.template operator()<T, K, true>();
      }
      f.template operator()<T, K, false>();
    });
  });
}

// Each runs an op on checked tensors; `map_vectors` is the back end.
template <typename MapVectors>
void run_activation(const MapVectors& map_vectors, const TensorView& out, const TensorView& x,
                    const std::optional<TensorView>& bias, const std::string& kind, const std::string& tier) {
  const char* op = "activation";
  RowArg args[] = {{"x", x, 1}, {"out", out, 1}};
  const RowPlan plan = plan_vectors(op, x, args);
  dispatch_tier(op, x.dtype, kind, tier, [&]<typename T, typename K, bool Exact>() {
    using Op = Activate<T, K, Exact>;
    map_vectors(plan,
                Vectors<T, Op>{{args[0].vectors<const T>()}, {column_param(bias)}, {args[1].vectors<T>()}},
                Op());
  });
}

template <typename MapVectors>
void run_activation_backward(const MapVectors& map_vectors, const TensorView& out, const TensorView& grad,
                             const TensorView& x, const std::optional<TensorView>& bias,
                             const std::string& kind) {
  const char* op = "activation_backward";
  RowArg args[] = {{"grad", grad, 1}, {"x", x, 1}, {"out", out, 1}};
  const RowPlan plan = plan_vectors(op, x, args);
  dispatch_tier(op, x.dtype, kind, "fast", [&]<typename T, typename K, bool>() {
    using Op = ActivateBackward<T, K>;
    map_vectors(plan,
                Vectors<T, Op>{{args[0].vectors<const T>(), args[1].vectors<const T>()},
                               {column_param(bias)},
                               {args[2].vectors<T>()}},
                Op());
  });
}

template <typename MapVectors>
void run_gated_activation(const MapVectors& map_vectors, const TensorView& out, const TensorView& x,
                          const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
                          const std::optional<TensorView>& up_bias, const std::string& kind, bool gate_first,
                          const std::string& tier) {
  const char* op = "gated_activation";
  const GateAndUp in(x, up, gate_first);
  RowArg args[] = {{"the gate", in.gate, 1}, {"up", in.up, 1}, {"out", out, 1}};
  const RowPlan plan = plan_vectors(op, out, args);
  dispatch_tier(op, x.dtype, kind, tier, [&]<typename T, typename K, bool Exact>() {
    using Op = GatedActivate<T, K, Exact>;
    Vectors<T, Op> vectors{
        {args[0].vectors<const T>(), args[1].vectors<const T>()}, {}, {args[2].vectors<T>()}};
    set_biases(vectors.param, up, bias, up_bias, gate_first);
    map_vectors(plan, vectors, Op());
  });
}

template <typename MapVectors>
void run_gated_activation_backward(const MapVectors& map_vectors, const TensorView& out,
                                   const TensorView& grad, const TensorView& x,
                                   const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
                                   const std::optional<TensorView>& up_bias, const std::string& kind,
                                   bool gate_first) {
  const char* op = "gated_activation_backward";
  const GateAndUp in(x, up, gate_first), to(out, std::nullopt, up || gate_first);
  RowArg args[] = {
      {"grad", grad, 1}, {"the gate", in.gate, 1}, {"up", in.up, 1}, {"out", to.gate, 1}, {"out", to.up, 1}};
  const RowPlan plan = plan_vectors(op, grad, args);
  dispatch_tier(op, x.dtype, kind, "fast", [&]<typename T, typename K, bool>() {
    using Op = GatedActivateBackward<T, K>;
    Vectors<T, Op> vectors{
        {args[0].vectors<const T>(), args[1].vectors<const T>(), args[2].vectors<const T>()},
        {},
        {args[3].vectors<T>(), args[4].vectors<T>()}};
    set_biases(vectors.param, up, bias, up_bias, gate_first);
    map_vectors(plan, vectors, Op());
  });
}

}  // namespace rfk
