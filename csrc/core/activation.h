#pragma once

#include <string_view>
#include <type_traits>

#include "core/check.h"
#include "core/math.h"

// Activation functions and their derivatives for one value of a kernel, in float or double.

namespace rfk {

enum class Activation { gelu, gelu_tanh, silu, relu2 };

// A kind that is known when a loop is compiled; converts to Activation, so that `activate` has no branch.
template <Activation K> using Kind = std::integral_constant<Activation, K>;

// gelu       x P(N <= x)
// gelu_tanh  x sigmoid(2 s), s = sqrt(2/pi) (x + 0.044715 x^3); equal to x/2 (1 + tanh s)
// silu       x sigmoid(x)
// relu2      max(x, 0)^2
template <typename A> RFK_HD A activate(Activation kind, A x) {
  if (kind == Activation::gelu) return x * normal(x).cdf;
  if (kind == Activation::relu2) {
    x = detail::select(x < 0, A(0), x);  // NaN stays
    return x * x;
  }
  const A exponent =
      kind == Activation::silu ? -x : x * (A(-1.5957691216057308) - A(0.07135481627260025) * (x * x));
  return x / detail::one_plus_exp(exponent);
}

template <typename A> struct Activated {
  A value, grad;
};

// activate(kind, x) and its derivative, which have most of their work in common.
template <typename A> RFK_HD Activated<A> activate_with_grad(Activation kind, A x) {
  if (kind == Activation::relu2) {
    const A positive = detail::select(x < 0, A(0), x);
    return {positive * positive, 2 * positive};
  }
  const A y = detail::clamp(x, A(-800), A(800));  // beyond, terms of a derivative are infinity times 0
  if (kind == Activation::gelu) {
    const Normal<A> n = normal(y);
    return {x * n.cdf, n.cdf + y * n.density};
  }
  if (kind == Activation::silu) {
    const Logistic<A> s = logistic(y);
    return {x * s.value, s.value + y * s.slope};
  }
  const A a = A(1.5957691216057308), b = A(0.07135481627260025), square = y * y;
  const Logistic<A> s = logistic(y * (a + b * square));
  return {x * s.value, s.value + y * s.slope * (a + 3 * b * square)};
}

// d activate(kind, x) / dx
template <typename A> RFK_HD A activate_grad(Activation kind, A x) {
  return activate_with_grad(kind, x).grad;
}

// Calls f(Kind<K>()) with the kind of that name.
template <typename F> void dispatch_activation(const char* op, std::string_view kind, F&& f) {
  if (kind == "gelu") return f(Kind<Activation::gelu>());
  if (kind == "gelu_tanh") return f(Kind<Activation::gelu_tanh>());
  if (kind == "silu") return f(Kind<Activation::silu>());
  if (kind == "relu2") return f(Kind<Activation::relu2>());
  fail(op, ": kind must be gelu, gelu_tanh, silu or relu2, got ", kind);
}

}  // namespace rfk
