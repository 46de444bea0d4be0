#pragma once

#include <cstring>
#include <limits>

#include "attention/plan_cpu.h"
#include "core/pack.h"

// From tokens to the panels of plan_cpu.h.

namespace rfk {

template <Product P> struct Numbers;
template <> struct Numbers<Product::int8> {
  using Number = int8_t;
  using Word = uint32_t;
  using A = float;
};
template <> struct Numbers<Product::bf16> {
  using Number = bf16;
  using Word = uint32_t;
  using A = float;
};
template <> struct Numbers<Product::f32> {
  using Number = float;
  using Word = uint32_t;
  using A = float;
};
template <> struct Numbers<Product::f64> {
  using Number = double;
  using Word = uint64_t;
  using A = double;
};

// Tokens of one head: row i lies at data + i stride (bytes).
struct Tokens {
  const char* data;
  int64_t stride, d;
  DType dtype;
  const char* row(int64_t i) const { return data + i * stride; }
};

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A row of floats in steps of top / 127.
struct CodedRow {
  float scale;  // NaN where the row has a number that is not finite; its codes are 0 then
  double squares, top;
};

RFK_SIMD inline bool is_finite_row(const float* v, int64_t n) {
  int32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) bad |= !(std::fabs(v[i]) <= 3.4028235e38f);
  return !bad;
}

template <bool kUnsigned> RFK_SIMD CodedRow code_row(int8_t* codes, const float* v, int64_t n, int64_t padded) {
  float top = 0, squares = 0;
#pragma omp simd reduction(max : top) reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    top = v[i] > top ? v[i] : top;
    top = -v[i] > top ? -v[i] : top;
    squares += v[i] * v[i];
  }
  const bool finite = is_finite_row(v, n);
  const float bounded = top > 1e-28f ? top : 1e-28f, inverse = finite ? 127 / bounded : 0.0f;
  constexpr int32_t kMagic = 0x4b400000;  // 1.5 2^23: a sum with it is rounded in its last bits
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = finite ? v[i] * inverse : 0.0f;
    codes[i] = int8_t((std::bit_cast<int32_t>(scaled + 0x1.8p23f) - kMagic) ^ (kUnsigned ? 0x80 : 0));
  }
  std::memset(codes + n, kUnsigned ? 0x80 : 0, padded - n);
  if (!finite) return {kNan, kNan, 0};
  return {bounded / 127, squares, top};
}

// Decodes row i to numbers, zeros up to `padded`.
template <typename D> void decode_row(D* out, const Tokens& t, int64_t i, int64_t padded) {
  decode_any(out, t.row(i), t.dtype, t.d);
  std::memset(static_cast<void*>(out + t.d), 0, (padded - t.d) * sizeof(D));
}

// Adds to sums [d] what is finite of rows first .. first + count.
void add_finite(float* sums, const Tokens& t, int64_t first, int64_t count, float* decoded);

// Packs `count` keys or values from `first` on, a tile. Scales of keys are 0 before, and NaN afterwards for
// those that are not finite, be it in their value: values are packed first.
struct PackFunctions {
  void (*keys)(const HeadLayout& layout, const TilePanels& to, const Tokens& k, int64_t first, int64_t count,
               const float* mean, void* decoded);
  void (*values)(const HeadLayout& layout, const TilePanels& to, const Tokens& v, int64_t first,
                 int64_t count, void* decoded);
};
PackFunctions pack_functions(Products p);

}  // namespace rfk
