#pragma once

#include <cmath>
#include <limits>

#include "attention/softmax.h"

// The softmax of a tile for lanes L of an instruction set. Included behind its `#pragma GCC target`.

namespace rfk {
namespace {

// 2^x for x <= 8 and -infinity, relative error 3e-6 (Degree 4) or 2e-8 (6); NaN stays. L::split(x) is
// x = n + r with n an integer and r in 0 .. 1, where r is a number even if x is -infinity.
template <int Degree, typename L> inline typename L::V exp2_of(typename L::V x) {
  if constexpr (L::kExact) {
    return L::exp2(x);
  } else {
    const auto parts = L::split(x);
    const auto r = parts.r;
    auto p = L::set(Degree == 4 ? 0.013426685f : 0.00021612915f);
    if constexpr (Degree == 6)
      p = L::fma(p, r, L::set(0.0012467847f)), p = L::fma(p, r, L::set(0.0096754516f));
    p = L::fma(p, r, L::set(Degree == 4 ? 0.052242473f : 0.055485282f));
    p = L::fma(p, r, L::set(Degree == 4 ? 0.24128021f : 0.24022931f));
    p = L::fma(p, r, L::set(Degree == 4 ? 0.69304484f : 0.69314706f));
    return L::times_power(L::fma(p, r, L::set(1.0f)), parts);
  }
}

// The largest exponent of row i; with a bias the scores become exponents.
template <typename L, bool kBias, typename A> inline A top_of_row(const SoftmaxTile<A>& t, int i) {
  const auto factor = L::set(t.factor[i]);
  auto top = L::set(-std::numeric_limits<A>::infinity());
  const auto panel = [&]<bool kTail>(int p) __attribute__((always_inline)) {
    A* const scores = t.scores + (p * t.stride + i) * kPanel;
#pragma GCC unroll 8
    for (int at = 0; at < kPanel; at += L::kLanes) {
      auto s = L::load(scores + at);
      if constexpr (kBias) s = L::fma(s, factor, L::load(t.bias + i * t.bias_stride + p * kPanel + at));
      if constexpr (kTail) s = L::first(s, t.tail - at);  // -infinity behind the last key
      if constexpr (kBias || kTail) L::store(scores + at, s);
      top = L::max(top, s);
    }
  };
  for (int p = 0; p < t.panels - 1; ++p) panel.template operator()<false>(p);
  if (t.tail < kPanel)
    panel.template operator()<true>(t.panels - 1);
  else
    panel.template operator()<false>(t.panels - 1);
  return L::top(top) * (kBias ? A(1) : t.factor[i]);
}

// What the row's maxima make of earlier tiles and of this one, for all rows at once. Returns in `base` what
// is taken from exponents.
template <typename L, bool kIntegers, int Degree, typename A> inline void move_tops(RowState<A>& s, A* base) {
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

// Exponents so large that their rounding shows (a code of 255.5 would be one too many) become differences
// from the row's top, which are exact.
inline constexpr float kLargeExponent = 1 << 12;

template <typename L, bool kBias, typename A> inline void take_top(const SoftmaxTile<A>& t, int i, A top) {
  const auto factor = L::set(kBias ? A(1) : t.factor[i]), taken = L::set(top);
  for (int p = 0; p < t.panels; ++p)
    for (int at = 0; at < kPanel; at += L::kLanes) {
      A* const scores = t.scores + (p * t.stride + i) * kPanel + at;
      L::store(scores, L::load(scores) * factor - taken);
    }
}

template <typename L, bool kBias, typename A>
inline typename L::V exponent(const A* scores, typename L::V factor, typename L::V minus) {
  const auto s = L::load(scores);
  return kBias ? s + minus : L::fma(s, factor, minus);
}

// Writes the weights of row i and returns their sum.
template <typename L, Product W, bool kBias, bool kRelative, int Degree, typename A>
inline A weights_of_row(const SoftmaxTile<A>& t, int i, A by, A base) {
  const auto factor = L::set(by), minus = L::set(-base), one = L::set(1);
  auto sum = L::set(0);
  auto* const words = static_cast<typename L::Word*>(t.weights) + i * weight_stride(W);
  for (int p = 0; p < t.panels; ++p) {
    const A* const scores = t.scores + (p * t.stride + i) * kPanel;
    typename L::V w[kPanel / L::kLanes];
#pragma GCC unroll 32
    for (int n = 0; n < kPanel / L::kLanes; ++n) {
      w[n] = exp2_of<Degree, L>(exponent<L, kBias>(scores + n * L::kLanes, factor, minus));
      sum = L::fma(w[n], one, sum);  // FMA units idle, adders do not
      if constexpr (kRelative) w[n] *= L::load(t.relative + t.panel_keys[p] + n * L::kLanes - i);
      if constexpr (W != Product::bf16)
        L::store(reinterpret_cast<A*>(words) + p * kPanel + n * L::kLanes, w[n]);
    }
    if constexpr (W == Product::bf16) L::store_bf16(words + p * kPanel / 2, w[0], w[1]);
  }
  return L::total(sum);
}

// The same as integers: byte q of word w of 64 keys is that of key 16 q + w. `integers` becomes their sum;
// returned is the sum of the weights before.
template <typename L, bool kBias, int Degree>
inline float codes_of_row(const SoftmaxTile<float>& t, int i, float by, float base, float& integers) {
  constexpr float kLog255 = 7.99435344f;
  const auto factor = L::set(by), minus = L::set(kLog255 - base), one = L::set(1.0f);
  auto sum = L::set(0);
  auto codes = L::no_codes();
  auto* const words = static_cast<uint32_t*>(t.weights) + i * weight_stride(Product::int8);
  for (int p = 0; p < t.panels; p += 2) {
    const float* const scores = t.scores + (p * t.stride + i) * kPanel;
    const bool both = p + 1 < t.panels;
#pragma GCC unroll 4
    for (int w = 0; w < 16; w += L::kLanes) {
      typename L::I bytes[4] = {};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        if (q >= 2 && !both) break;
        const int at = q / 2 * t.stride * kPanel + q % 2 * 16 + w;
        const auto v = exp2_of<Degree, L>(exponent<L, kBias>(scores + at, factor, minus));
        sum = L::fma(v, one, sum);
        bytes[q] = (typename L::I)L::fma(v, one, L::set(0x1.8p23f));  // rounded, in the last byte
      }
      const typename L::I word =
          (bytes[0] & 255) | (bytes[1] & 255) << 8 | (bytes[2] & 255) << 16 | bytes[3] << 24;
      L::add_codes(codes, word);
      L::store_words(words + p * kPanel / 4 + w, word);
    }
  }
  integers = float(L::total_codes(codes));
  return L::total(sum) * (1.0f / 255);
}

template <typename L, Product W, bool kBias, bool kRelative, typename A>
inline void softmax_rows(const SoftmaxTile<A>& t) {
  constexpr int kDegree = W == Product::f32 || W == Product::f64 ? 6 : 4;
  alignas(64) A base[kRowSlots];
  for (A& b : base) b = -std::numeric_limits<A>::infinity();
  for (int i = 0; i < t.rows; ++i) base[i] = top_of_row<L, kBias>(t, i);
  RowState<A>& s = *t.state;
  move_tops<L, W == Product::int8, kDegree>(s, base);
  for (int i = 0; i < t.rows; ++i) {
    A by = t.factor[i];
    if (std::fabs(base[i]) >= kLargeExponent) {
      take_top<L, kBias>(t, i, base[i]);
      by = 1, base[i] = 0;
    }
    if constexpr (W == Product::int8) {
      float integers;
      const float exact = codes_of_row<L, kBias, kDegree>(t, i, by, base[i], integers);
      s.exact[i] = s.exact[i] * s.rescale[i] + exact * s.step[i];
      s.sum[i] = s.sum[i] * s.rescale[i] + integers * s.step[i] + (exact - exact);  // NaN where there is one
    } else {
      const A sum = weights_of_row<L, W, kBias, kRelative, kDegree>(t, i, by, base[i]);
      s.sum[i] = s.exact[i] = s.sum[i] * s.rescale[i] + sum;
    }
  }
}

template <typename L, Product W, typename A> void softmax(const SoftmaxTile<A>& t) {
  if constexpr (W != Product::int8) {
    if (t.relative) return t.bias ? softmax_rows<L, W, true, true>(t) : softmax_rows<L, W, false, true>(t);
  }
  t.bias ? softmax_rows<L, W, true, false>(t) : softmax_rows<L, W, false, false>(t);
}

}  // namespace
}  // namespace rfk
