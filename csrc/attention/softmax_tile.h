#pragma once

#include <limits>

#include "attention/softmax.h"

// The softmax of a tile for lanes L of an instruction set. Included behind its `#pragma GCC target`.

namespace rfk {
namespace {

// 2^x for x <= 0 and -infinity, relative error 3e-6 (Degree 4) or 2e-8 (6); NaN stays.
template <int Degree, typename L> inline typename L::V exp2_of(typename L::V x) {
  if constexpr (L::kExact) {
    return L::exp2(x);
  } else {
    x = L::max(L::set(-150.0f), x);  // 2^-150 is 0
    const auto shifted = x + L::set(0x1.8p23f), r = x - (shifted - L::set(0x1.8p23f));
    auto p = L::set(Degree == 4 ? 0.0095828529f : 0.00015353363f);
    if constexpr (Degree == 6) p = L::fma(p, r, L::set(0.0013398874f)), p = L::fma(p, r, L::set(0.0096184369f));
    p = L::fma(p, r, L::set(Degree == 4 ? 0.055906426f : 0.055503324f));
    p = L::fma(p, r, L::set(Degree == 4 ? 0.24024099f : 0.24022648f));
    p = L::fma(p, r, L::set(Degree == 4 ? 0.69312418f : 0.69314718f));
    p = L::fma(p, r, L::set(1.0f));
    return L::times_power(p, shifted, x);
  }
}

// The largest exponent of row i; with a bias the scores become exponents.
template <typename L, bool kBias, typename A> inline A top_of_row(const SoftmaxTile<A>& t, int i) {
  const auto factor = L::set(t.factor[i]);
  auto top = L::set(-std::numeric_limits<A>::infinity());
  for (int p = 0; p < t.panels; ++p) {
    A* const scores = t.scores + (p * t.stride + i) * kPanel;
    const int there = p == t.panels - 1 ? t.tail : kPanel;
#pragma GCC unroll 8
    for (int at = 0; at < kPanel; at += L::kLanes) {
      auto s = L::load(scores + at);
      if constexpr (kBias) s = L::fma(s, factor, L::load(t.bias + i * t.bias_stride + p * kPanel + at));
      if (there < at + L::kLanes) s = L::first(s, there - at);  // -infinity behind the last key
      if (kBias || there < at + L::kLanes) L::store(scores + at, s);
      top = L::max(top, s);
    }
  }
  return L::top(top) * (kBias ? A(1) : t.factor[i]);
}

// What the row's maxima make of earlier tiles and of this one, for all rows at once. Returns in `base` what
// is taken from exponents.
template <typename L, bool kIntegers, int Degree, typename A>
inline void move_tops(RowState<A>& s, A* base) {
  const auto lowest = L::set(-std::numeric_limits<A>::infinity()), zero = L::set(0);
  for (int i = 0; i < kRowSlots; i += L::kLanes) {
    const auto tile = L::load(base + i), old = L::load(s.top + i), top = L::max(tile, old);
    const auto finite = L::if_equal(top, lowest, zero, top);
    L::store(s.rescale + i, exp2_of<Degree, L>(old - finite));
    if (kIntegers) L::store(s.step + i, exp2_of<Degree, L>(tile - finite));
    L::store(s.top + i, top);
    L::store(base + i, kIntegers ? L::if_equal(tile, lowest, zero, tile) : finite);
  }
}

// Writes the weights of row i; returns their sum, before they become integers, and adds the sum of these.
template <typename L, Product W, bool kBias, bool kRelative, int Degree, typename A>
inline A weights_of_row(const SoftmaxTile<A>& t, int i, A base, A& integers) {
  const auto factor = L::set(t.factor[i]), minus = L::set(-base);
  auto sum = L::set(0), codes = L::set(0);
  auto* const words = static_cast<typename L::Word*>(t.weights) + i * weight_stride(W);
  for (int p = 0; p < t.panels; ++p) {
    const A* const scores = t.scores + (p * t.stride + i) * kPanel;
#pragma GCC unroll 8
    for (int at = 0; at < kPanel; at += L::kLanes) {
      const auto s = L::load(scores + at);
      auto w = exp2_of<Degree, L>(kBias ? s + minus : L::fma(s, factor, minus));
      sum += w;
      if constexpr (W == Product::int8) {
        const auto code = L::fma(w, L::set(255.0f), L::set(0x1.8p23f));  // the code in its last bits
        codes += code - L::set(0x1.8p23f);
        L::store_codes(reinterpret_cast<uint8_t*>(words) + p * kPanel + at, code);
        continue;
      }
      if constexpr (kRelative) w *= L::load(t.relative + t.panel_keys[p] + at - i);
      if constexpr (W == Product::bf16)
        L::store_bf16(reinterpret_cast<uint16_t*>(words) + p * kPanel + at, w);
      else
        L::store(reinterpret_cast<A*>(words) + p * kPanel + at, w);
    }
  }
  integers = W == Product::int8 ? L::total(codes) : A(0);
  return L::total(sum);
}

template <typename L, Product W, bool kBias, bool kRelative, typename A>
inline void softmax_rows(const SoftmaxTile<A>& t) {
  constexpr int kDegree = W == Product::f32 || W == Product::f64 ? 6 : 4;
  alignas(64) A base[kRowSlots];
  for (A& b : base) b = -std::numeric_limits<A>::infinity();
  for (int i = 0; i < t.rows; ++i) base[i] = top_of_row<L, kBias>(t, i);
  move_tops<L, W == Product::int8, kDegree>(*t.state, base);
  for (int i = 0; i < t.rows; ++i) {
    RowState<A>& s = *t.state;
    A integers;
    const A sum = weights_of_row<L, W, kBias, kRelative, kDegree>(t, i, base[i], integers);
    const A step = W == Product::int8 ? s.step[i] : A(1);
    s.exact[i] = s.exact[i] * s.rescale[i] + sum * step;
    s.sum[i] = W == Product::int8 ? s.sum[i] * s.rescale[i] + integers * step : s.exact[i];
  }
}

template <typename L, Product W, typename A> void softmax(const SoftmaxTile<A>& t) {
  if (W != Product::int8 && t.relative) {  // integers go without
    if (t.bias) return softmax_rows<L, W, true, W != Product::int8>(t);
    return softmax_rows<L, W, false, W != Product::int8>(t);
  }
  t.bias ? softmax_rows<L, W, true, false>(t) : softmax_rows<L, W, false, false>(t);
}

}  // namespace
}  // namespace rfk
