#pragma once

#include <cmath>
#include <limits>

#include "attention/softmax_tile.h"

// Lanes in GCC's vectors of floats, and of integers of the same size, for instruction sets without masks.
// Included behind `#pragma GCC target`.

namespace rfk {
namespace {

template <typename Floats, typename Integers> struct VectorLanes {
  using V = Floats;
  using I = Integers;
  using Word = uint32_t;
  static constexpr int kLanes = sizeof(V) / 4;
  static constexpr bool kExact = false;
  static V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static V set(float v) { return V{} + v; }
  static V max(V a, V b) { return a > b ? a : b; }  // b where one is NaN
  static V first(V v, int count) {
    for (int i = count < 0 ? 0 : count; i < kLanes; ++i) v[i] = -std::numeric_limits<float>::infinity();
    return v;
  }
  static V if_equal(V a, V b, V then, V otherwise) { return a == b ? then : otherwise; }
  static V times_power(V p, V shifted, V x) {
    const V v = (V)((I)p + ((I)shifted << 23));
    return x < set(-126.0f) ? V{} : v;
  }
  static float top(V v) {
    float top = v[0];
    for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
    return top;
  }
  static float total(V v) {
    for (int half = kLanes / 2; half >= 1; half /= 2)
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
  }
  static void store_codes(uint8_t* p, V code) {
    const I bits = (I)code;
    for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(bits[i]);
  }
};

}  // namespace
}  // namespace rfk
