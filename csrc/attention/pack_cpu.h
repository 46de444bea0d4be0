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
  template <typename T> const T* row_of(int64_t i) const { return reinterpret_cast<const T*>(row(i)); }
};

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A row in int8 steps of its largest number, top / 127. A query is multiplied by `sign`, from a key the mean
// is taken; `dot` is that of a query and the mean.
struct CodedRow {
  float scale;  // NaN where the row has a number that is not finite; its codes are 0 then
  float top, squares, dot;
  int32_t sum;  // of codes
};

enum class Row : uint8_t { query, key };  // codes of queries are offset by 128 (core/tiles.h)

template <Row kRow, typename T>
RFK_SIMD CodedRow code_row(int8_t* codes, const T* row, const float* mean, float sign, int64_t n,
                           int64_t padded) {
  constexpr int32_t kInfinity = 0x7f800000, kMagic = 0x4b400000;  // 1.5 2^23: a sum with it is rounded
  alignas(64) float v[kMaxHeadDim];
  int32_t top = 0, sum = 0;  // the bits of a positive float are in its order, and NaN is the largest
  float squares = 0, dot = 0;
#pragma omp simd reduction(max : top) reduction(+ : squares, dot)
  for (int64_t i = 0; i < n; ++i) {
    const float x = float(load(row[i])), u = kRow == Row::query ? x * sign : x - mean[i];
    if (kRow == Row::query) dot += u * mean[i];
    const int32_t bits = std::bit_cast<int32_t>(u) & 0x7fffffff;
    top = bits > top ? bits : top;
    squares += u * u;
    v[i] = u;
  }
  const bool finite = top < kInfinity;
  const float given = std::bit_cast<float>(top), largest = given > 1e-28f ? given : 1e-28f;
  const float inverse = 127 / largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = finite ? v[i] * inverse : 0.0f;
    const int32_t code = std::bit_cast<int32_t>(scaled + 0x1.8p23f) - kMagic;
    sum += code;
    codes[i] = int8_t(code ^ (kRow == Row::query ? 0x80 : 0));
  }
  for (int64_t i = n; i < padded; ++i) codes[i] = 0;
  if (!finite) return {kNan, kNan, kNan, dot, 0};
  return {largest / 127, given, squares, dot, sum};
}

// Decodes row i to numbers, zeros up to `padded`.
template <typename D> void decode_row(D* out, const Tokens& t, int64_t i, int64_t padded) {
  decode_any(out, t.row(i), t.dtype, t.d);
  std::memset(static_cast<void*>(out + t.d), 0, (padded - t.d) * sizeof(D));
}

// Adds to sums [d] what is finite of rows first .. first + count.
void add_finite(float* sums, const Tokens& t, int64_t first, int64_t count);

// Packs `count` keys or values from `first` on, a tile. Scales of keys are 0 before, and NaN afterwards for
// those that are not finite, be it in their value: values are packed first.
struct PackFunctions {
  void (*keys)(const HeadLayout& layout, const TilePanels& to, const Tokens& k, int64_t first, int64_t count,
               const float* mean, void* scratch);
  void (*values)(const HeadLayout& layout, const TilePanels& to, const Tokens& v, int64_t first,
                 int64_t count, void* scratch);
};
PackFunctions pack_functions(Products p);

}  // namespace rfk
