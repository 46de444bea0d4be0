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
  struct Parts {
    V r, x, n;
  };
  static Parts split(V x) {
    const V bounded = x < set(-126.0f) ? set(-126.0f) : x;  // NaN stays
    const V shifted = (bounded - 0.5f) + set(0x1.8p23f);  // floor(x), or one less where x is an integer
    return {bounded - (shifted - set(0x1.8p23f)), x, shifted};
  }
  static V times_power(V p, Parts parts) {
    const V v = (V)((I)p + ((I)parts.n << 23));
    return parts.x < set(-126.0f) ? V{} : v;
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
  static void store_words(uint32_t* p, I v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static I no_codes() { return I{}; }
  static void add_codes(I& sum, I words) {
    sum += (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24 & 255);
  }
  static int32_t total_codes(I sum) {
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    return total;
  }
};

}  // namespace
}  // namespace rfk
