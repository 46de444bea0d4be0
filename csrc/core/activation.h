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
  switch (kind) {
    case Activation::gelu: return x * normal(x).cdf;
    case Activation::gelu_tanh:
      return x / (1 + exp_(x * (A(-1.5957691216057308) - A(0.07135481627260025) * (x * x))));
    case Activation::silu: return x / (1 + exp_(-x));
    case Activation::relu2: break;
  }
  x = x < 0 ? A(0) : x;  // NaN stays
  return x * x;
}

// d activate(kind, x) / dx
template <typename A> RFK_HD A activate_grad(Activation kind, A x) {
  if (kind == Activation::relu2) return x < 0 ? A(0) : 2 * x;
  x = detail::clamp(x, A(-800), A(800));  // beyond, the derivatives are 0 and 1, but their terms inf times 0
  if (kind == Activation::gelu) {
    const Normal<A> n = normal(x);
    return n.cdf + x * n.density;
  }
  if (kind == Activation::silu) {
    const Logistic<A> s = logistic(x);
    return s.value + x * s.slope;
  }
  const A square = x * x;
  const Logistic<A> s = logistic(x * (A(1.5957691216057308) + A(0.07135481627260025) * square));
  return s.value + x * s.slope * (A(1.5957691216057308) + A(0.2140644488178007) * square);
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
