#pragma once

#include <cmath>

#include "core/quantize.h"
#include "core/rows.h"

// The region between two linear layers of a transformer block, row by row:
//
//   r = x + act(gate) w_b N_b(y)                           gated residual (stored, and read as stored below)
//   n = (N(r) w + b) (1 + scale) + shift                   norm and modulation
//
// with N(v) = v, (v - mean) rstd (layer) or v rstd (rms), rstd = 1 / sqrt(variance or mean square + eps).
// Without y, r is x. The result n is stored or quantised. T is the type of the tokens, M that of the
// parameters.

namespace rfk {

enum class Norm : uint8_t { none, layer, rms };

template <typename A> struct Moments {
  A mean = 0, rstd = 1;
};

// The numbers of one column. Fast: `weight` and `bias` are folded into the others.
template <typename A> struct Affine {
  A weight = 1, bias = 0, factor = 1, shift = 0;

  RFK_HD Affine folded() const { return {1, 0, weight * factor, bias * factor + shift}; }
};

// Which roundings a call makes: one at the end, or as a chain of torch ops makes them, to the type of the
// parameters.
enum class Tier : uint8_t { fast, exact, exact_before_weight };

// (n w + b) factor + shift
template <typename M, Tier kTier, typename A> RFK_HD A modulate(A n, Affine<A> k) {
  if constexpr (kTier == Tier::fast) {
    return n * k.factor + k.shift;
  } else {
    if constexpr (kTier == Tier::exact_before_weight) n = rounded_to<M>(n);
    return rounded_to<M>(rounded_to<M>(n * k.weight + k.bias) * k.factor) + k.shift;
  }
}

// 1 + scale
template <typename M, typename A> RFK_HD A scale_factor(A scale, Tier tier) {
  return tier == Tier::fast ? 1 + scale : rounded_to<M>(1 + scale);
}

// act(gate) where that is tanh
template <typename M, typename A> RFK_HD A gate_factor(A gate, Tier tier) {
  const A t = std::tanh(gate);
  return tier == Tier::fast ? t : rounded_to<M>(t);
}

// Which row of the parameter tables serves a row of tokens, where an index says so.
struct GroupIndex {
  const void* data = nullptr;  // int64 or int32, one a row
  int64_t stride[kRowAxes] = {};
  bool wide = true;
  int64_t groups = 0;

  RFK_HD bool given() const { return data != nullptr; }
  RFK_HD int64_t at(RowIndex r) const {
    int64_t at = 0;
    for (int a = 0; a < kRowAxes; ++a) at += r.i[a] * stride[a];
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

// The parameter rows of one row of tokens; null where absent. `poison` is NaN for an index out of range.
template <typename M, typename A> struct Parameters {
  const M *gate, *scale, *shift;
  A poison;

  bool operator==(const Parameters& o) const {
    return gate == o.gate && scale == o.scale && shift == o.shift && poison == o.poison;
  }
};

template <typename T, typename M> struct AdaNorm {
  using A = acc_t<T>;
  const char* name;
  RowPlan plan;
  RowVectors<const T> x, y;
  RowVectors<T> x_out, out;
  RowVectors<const M> gate, scale, shift;
  GroupIndex index;
  const M *branch_weight = nullptr, *weight = nullptr, *bias = nullptr;
  Norm branch_norm = Norm::none, norm = Norm::none;
  bool tanh = false;
  Tier tier = Tier::fast;
  A eps = 0;
  QuantizedRows quantized;

  // Packs of eight neighbours may be moved by 16-byte accesses (codes: 8).
  bool aligned() const {
    const auto whole = [](const M* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return plan.cols % 8 == 0 && x.aligned(16) && y.aligned(16) && x_out.aligned(16) && out.aligned(16) &&
           gate.aligned(16) && scale.aligned(16) && shift.aligned(16) && quantized.codes.aligned(8) &&
           whole(branch_weight) && whole(weight) && whole(bias);
  }

  RFK_HD bool finishes() const { return out.data || quantized.codes.data; }

  RFK_HD Parameters<M, A> parameters(RowIndex r) const {
    if (!index.given()) return {row_of(gate, r), row_of(scale, r), row_of(shift, r), 0};
    const int64_t g = index.at(r);
    const bool inside = 0 <= g && g < index.groups;
    const int64_t at = inside ? g : 0;
    return {group_of(gate, at), group_of(scale, at), group_of(shift, at), inside ? A(0) : A(NAN)};
  }

 private:
  static RFK_HD const M* row_of(const RowVectors<const M>& t, RowIndex r) {
    return t.data ? t.at(r) : nullptr;
  }
  static RFK_HD const M* group_of(const RowVectors<const M>& t, int64_t g) {
    return t.data ? t.data + g * t.stride[0] : nullptr;
  }
};

}  // namespace rfk
