#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/hd.h"

// Elementary functions of both back ends, float without branches and library calls: loops over them become
// SIMD, and CPU and CUDA give the same bits. double: the library's. NaN stays NaN. Coefficients are minimax
// fits over the ranges named beside them.

namespace rfk {

namespace detail {

// e^(x + low) = 2^n (1 + m) for |x| <= 128; the last bits of `scaled` are n + 254.
struct ExpParts {
  float m;
  uint32_t scaled;
};

RFK_HD ExpParts exp_parts(float x, float low) {
  constexpr float kMagic = 0x1.8p23f + 254;  // a sum with it is rounded to an integer, in the last bits
  const float shifted = x * 0x1.715476p+0f + kMagic, n = shifted - kMagic;
  // ln 2 in two parts, of which n times the first is exact
  const float r = (x - n * 0x1.62e4p-1f) + (low - n * 0x1.7f7d1cp-20f);
  // (e^r - 1 - r) / r^2 for |r| <= 0.347, to 3e-9 of e^r
  const float q =
      0.49999994f + r * (0.1666652f + r * (0.041668393f + r * (0.008368756f + r * 0.0013814517f)));
  return {r + r * r * q, std::bit_cast<uint32_t>(shifted)};
}

template <typename A> RFK_HD A clamp(A x, A low, A high) {  // NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

}  // namespace detail

// e^(x + low) within 1 ulp, subnormal results included; `low`, below 1/16, holds what x has no bits for.
RFK_HD float exp_(float x, float low = 0) {
  const detail::ExpParts e = detail::exp_parts(detail::clamp(x, -105.0f, 89.0f), low);
  // 2^n in two factors: either alone is a normal number
  const uint32_t first = (e.scaled & 0x1fe) << 22, second = (e.scaled << 23) - first;
  return (1 + e.m) * std::bit_cast<float>(first) * std::bit_cast<float>(second);
}
RFK_HD double exp_(double x) { return std::exp(x); }

// tanh within 3 ulp, as (e^2a - 1) / (e^2a + 1) of a = |x| with e^2a - 1 free of cancellation.
RFK_HD float tanh_(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits & 0x80000000;
  const float a = std::bit_cast<float>(bits ^ sign);
  const detail::ExpParts e = detail::exp_parts(2 * (a > 20 ? 20.0f : a), 0);
  const float scale = std::bit_cast<float>((e.scaled - 127) << 23);
  const float minus_one = scale * e.m + (scale - 1);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(minus_one / (minus_one + 2)) | sign);
}
RFK_HD double tanh_(double x) { return std::tanh(x); }

// 1 / (1 + e^-x)
template <typename A> RFK_HD A sigmoid(A x) { return 1 / (1 + exp_(-x)); }

// The sigmoid and its derivative, each to a few units of its own value.
template <typename A> struct Logistic {
  A value, slope;
};

template <typename A> RFK_HD Logistic<A> logistic(A x) {
  const A e = exp_(x < 0 ? x : -x), r = 1 / (1 + e);
  return {x < 0 ? e * r : r, e * r * r};
}

// The standard normal distribution: P(X <= x), and its density.
template <typename A> struct Normal {
  A cdf, density;
};

// Both to 1e-6 of their value, tails included.
RFK_HD Normal<float> normal(float x) {
  const float a = detail::clamp(std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7fffffff), 0.0f, 15.0f);
  // -a^2/2 in two parts: the square of the upper half of a's bits is exact
  const float upper = std::bit_cast<float>(std::bit_cast<uint32_t>(a) & 0xfffff000);
  const float e = exp_(-0.5f * upper * upper, -0.5f * (a - upper) * (a + upper));
  // P(X > a) e^(a^2/2) for 0 <= a <= 14, to 6e-9: every coefficient is positive, nothing cancels
  const float p = 0.5f + a * (0.43655786f + a * (0.18192384f + a * (0.04018403f + a * 0.004047492f)));
  const float q =
      1 + a * (1.6710006f + a * (1.1971095f + a * (0.46600237f + a * (0.10073338f + a * 0.010145426f))));
  const float tail = e * (p / q);
  return {x > 0 ? 1 - tail : tail, 0.3989423f * e};
}
RFK_HD Normal<double> normal(double x) {
  return {0.5 * std::erfc(x * -0.70710678118654752440), 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

struct SinCos {
  float sine, cosine;
};

// Both to 1e-7 for angles up to 10^6, which double reduces to a quadrant and at most pi/4.
RFK_HD SinCos sin_cos(float angle) {
  constexpr double kMagic = 0x1.8p52;
  const double shifted = angle * 0x1.45f306dc9c883p-1 + kMagic, n = shifted - kMagic;
  const float r = float((angle - n * 0x1.921fb544p+0) - n * 0x1.0b4611a626331p-34), z = r * r;
  const float s = r + r * z * (-0.16666655f + z * (0.00833216f + z * -0.000195152f));
  const float c = 1 - 0.5f * z + z * z * (0.041666646f + z * (-0.0013887367f + z * 2.4438357e-05f));
  const uint32_t quadrant = uint32_t(std::bit_cast<uint64_t>(shifted)) & 3;
  const uint32_t sine = std::bit_cast<uint32_t>(quadrant & 1 ? c : s) ^ (quadrant & 2) << 30;
  const uint32_t cosine = std::bit_cast<uint32_t>(quadrant & 1 ? s : c) ^ ((quadrant + 1) & 2) << 30;
  return {std::bit_cast<float>(sine), std::bit_cast<float>(cosine)};
}

}  // namespace rfk
