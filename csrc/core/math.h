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

// e^(x + low) = 2^n (1 + m) for |x| <= 128; the last bits of `scaled` are n + Bias.
struct ExpParts {
  float m;
  uint32_t scaled;
};

template <int Bias> RFK_HD ExpParts exp_parts(float x, float low = 0) {
  constexpr float kMagic = 0x1.8p23f + Bias;  // a sum with it is rounded to an integer, in the last bits
  const float shifted = x * 0x1.715476p+0f + kMagic, n = shifted - kMagic;
  // ln 2 in two parts, of which n times the first is exact
  const float r = (x - n * 0x1.62e4p-1f) - (n * 0x1.7f7d1cp-20f - low), square = r * r;
  // (e^r - 1 - r) / r^2 for |r| <= 0.347, to 3e-9 of e^r; in halves, for a short chain of operations
  const float q =
      (0.49999994f + 0.1666652f * r) + square * ((0.041668393f + 0.008368756f * r) + square * 0.0013814517f);
  return {r + square * q, std::bit_cast<uint32_t>(shifted)};
}

// e^(x + low) for |x| <= 128, subnormal results included: 2^n in two factors that are normal numbers.
RFK_HD float exp_in_range(float x, float low = 0) {
  const ExpParts e = exp_parts<254>(x, low);
  const uint32_t first = (e.scaled & 0x1fe) << 22, second = (e.scaled << 23) - first;
  return (1 + e.m) * std::bit_cast<float>(first) * std::bit_cast<float>(second);
}

// condition ? a : b without control flow, of which GCC makes a copy of all that follows for either case.
RFK_HD float select(bool condition, float a, float b) {
  const uint32_t mask = 0 - uint32_t(condition);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(a) & mask) | (std::bit_cast<uint32_t>(b) & ~mask));
}
RFK_HD double select(bool condition, double a, double b) { return condition ? a : b; }

template <typename A> RFK_HD A clamp(A x, A low, A high) {  // NaN stays
  x = select(x < low, low, x);
  return select(x > high, high, x);
}

// 1 + e^x; e^x is infinite from 2^127.5 on.
RFK_HD float one_plus_exp(float x) {
  const ExpParts e = exp_parts<127>(clamp(x, -88.0f, 89.0f));
  return 1 + (1 + e.m) * std::bit_cast<float>(e.scaled << 23);
}
RFK_HD double one_plus_exp(double x) { return 1 + std::exp(x); }

}  // namespace detail

// e^x within 1 ulp, subnormal results included.
RFK_HD float exp_(float x) { return detail::exp_in_range(detail::clamp(x, -105.0f, 89.0f)); }
RFK_HD double exp_(double x) { return std::exp(x); }

// ln x within 2 ulp, for x that are no smaller than the least normal number.
RFK_HD float log_(float x) {
  constexpr uint32_t kLeast = 0x3f3504f3;  // sqrt(1/2): x = 2^n (1 + r), 1 + r from there to sqrt(2)
  const uint32_t above = std::bit_cast<uint32_t>(x) - kLeast;
  const float n = float(int32_t(above) >> 23);
  const float r = std::bit_cast<float>((above & 0x7fffff) + kLeast) - 1, square = r * r;
  // (ln(1 + r) - r + r^2/2) / r^3, to 7e-10 of ln(1 + r)
  const float low = (0.3333331f - 0.24999987f * r) + square * (0.20002216f - 0.16669247f * r);
  const float high = (0.14218834f - 0.12384488f * r) + square * (0.118719339f - 0.1178871f * r);
  const float q = low + square * square * (high + square * square * 0.069162853f);
  const float small = square * (r * q - 0.5f) + n * 0x1.7f7d1cp-20f;
  return detail::select(x < INFINITY, (r + small) + n * 0x1.62e4p-1f, x);
}
RFK_HD double log_(double x) { return std::log(x); }

// tanh within 3 ulp, as (e^2a - 1) / (e^2a + 1) of a = |x| with e^2a - 1 free of cancellation.
RFK_HD float tanh_(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) & 0x80000000;
  const float a = std::fabs(x);
  const detail::ExpParts e = detail::exp_parts<127>(2 * detail::select(a > 20, 20.0f, a));
  const float scale = std::bit_cast<float>(e.scaled << 23);
  const float minus_one = scale * e.m + (scale - 1);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(minus_one / (minus_one + 2)) | sign);
}
RFK_HD double tanh_(double x) { return std::tanh(x); }

// 1 / (1 + e^-x), as 0 where it is subnormal
template <typename A> RFK_HD A sigmoid(A x) { return 1 / detail::one_plus_exp(-x); }

// The sigmoid and its derivative, each to a few units of its own value.
template <typename A> struct Logistic {
  A value, slope;
};

template <typename A> RFK_HD Logistic<A> logistic(A x) {
  const A e = exp_(-std::fabs(x)), r = 1 / (1 + e);
  return {detail::select(x < 0, e * r, r), e * r * r};
}

// The standard normal distribution: P(X <= x), and its density.
template <typename A> struct Normal {
  A cdf, density;
};

// Both to 1e-6 of their value, tails included.
RFK_HD Normal<float> normal(float x) {
  float a = std::fabs(x);
  a = detail::select(a > 15, 15.0f, a);
  // -a^2/2 in two parts: the square of the upper half of a's bits is exact
  const float upper = std::bit_cast<float>(std::bit_cast<uint32_t>(a) & 0xfffff000);
  const float e = detail::exp_in_range(-0.5f * upper * upper, -0.5f * (a - upper) * (a + upper));
  // P(X > a) e^(a^2/2) for 0 <= a <= 14, to 6e-9: every coefficient is positive, nothing cancels
  const float p = 0.5f + a * (0.43655786f + a * (0.18192384f + a * (0.04018403f + a * 0.004047492f)));
  const float q =
      1 + a * (1.6710006f + a * (1.1971095f + a * (0.46600237f + a * (0.10073338f + a * 0.010145426f))));
  const float tail = e * (p / q);
  return {detail::select(x > 0, 1 - tail, tail), 0.3989423f * e};
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
