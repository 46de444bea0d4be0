#pragma once

#include <cstring>
#include <limits>

#include "attention/plan_cpu.h"

// From tokens to the panels of plan_cpu.h.

namespace rfk {

// Tokens of one head: row i lies at data + i stride (bytes).
struct HeadTokens {
  const char* data;
  int64_t stride, d;
  DType dtype;
  const char* row(int64_t i) const { return data + i * stride; }
  template <typename T> const T* row_of(int64_t i) const { return reinterpret_cast<const T*>(row(i)); }
};

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A row in int8 steps of its largest number, top / 127.
struct CodedRow {
  float scale;  // NaN where the row has a number that is not finite; its codes are 0 then
  float top, squares, dot;
  int32_t sum;  // of codes
};

// What is made of a row: a query times `sign`, its codes offset by 128 (core/tiles.h), with `dot` that of it
// and the mean; a key less the mean, with the sum of its codes; or the squares alone.
enum class RowIs : uint8_t { query, key, squares };

constexpr int64_t padded(int64_t d) { return ceil_div(d, 16) * 16; }

// Sixteen numbers, in as many registers as an instruction set needs: sums of lanes need no loop of scalars.
using Floats __attribute__((vector_size(64))) = float;
using Integers __attribute__((vector_size(64))) = int32_t;
using Bytes __attribute__((vector_size(16))) = int8_t;

template <typename T> RFK_HD void load_into(Floats& to, const T* from) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint16_t __attribute__((vector_size(32))) bits;
    std::memcpy(&bits, from, sizeof(bits));
    to = (Floats)(__builtin_convertvector(bits, Integers) << 16);
  } else {
    for (int i = 0; i < 16; ++i) to[i] = float(load(from[i]));
  }
}

// A row of n numbers in pieces of sixteen, zeros behind n.
template <typename T> RFK_HD void load_row(Floats* to, const T* row, int64_t n) {
  const int64_t whole = n / 16, rest = n % 16;
  for (int64_t i = 0; i < whole; ++i) load_into(to[i], row + 16 * i);
  if (rest == 0) return;
  T tail[16] = {};
  for (int64_t i = 0; i < rest; ++i) tail[i] = row[16 * whole + i];
  load_into(to[whole], tail);
}

RFK_HD float total(const Floats& v) {
  float sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = v[i] + v[i + 8];
  for (int half = 4; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

RFK_HD int32_t total(const Integers& v) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
}

RFK_HD int32_t top(const Integers& v) {
  int32_t top = 0;
  for (int i = 0; i < 16; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// Writes `padded(n)` codes; `mean` has as many numbers, zeros behind n.
template <RowIs kRow, typename T>
RFK_SIMD CodedRow code_row(int8_t* codes, const T* row, const float* mean, float sign, int64_t n) {
  constexpr int32_t kInfinity = 0x7f800000, kMagic = 0x4b400000;  // 1.5 2^23: a sum with it is rounded
  Floats v[kMaxHeadDim / 16];
  const int64_t pieces = padded(n) / 16;
  load_row(v, row, n);
  Integers tops = {};  // the bits of a positive float are in its order, and NaN is the largest
  Floats squares = {}, dot = {};
  for (int64_t i = 0; i < pieces; ++i) {
    Floats m;
    std::memcpy(&m, mean + 16 * i, sizeof(m));
    v[i] = kRow == RowIs::query ? v[i] * sign : v[i] - m;
    if (kRow == RowIs::query) dot += v[i] * m;
    const Integers bits = (Integers)v[i] & 0x7fffffff;
    tops = bits > tops ? bits : tops;
    squares += v[i] * v[i];
  }
  const int32_t top_bits = top(tops);
  const float given = std::bit_cast<float>(top_bits), largest = given > 1e-28f ? given : 1e-28f;
  const bool finite = top_bits < kInfinity;
  if (kRow == RowIs::squares) return {finite ? 1 : kNan, given, finite ? total(squares) : kNan, 0, 0};
  const float inverse = 127 / largest;
  Integers sum = {};
  for (int64_t i = 0; i < pieces; ++i) {
    Integers code = (Integers)(v[i] * inverse + 0x1.8p23f) - kMagic;
    if (!finite) code = Integers{};
    if (kRow == RowIs::key) sum += code;
    const Bytes bytes = __builtin_convertvector(code ^ (kRow == RowIs::query ? 0x80 : 0), Bytes);
    std::memcpy(codes + 16 * i, &bytes, sizeof(bytes));
  }
  if (!finite) return {kNan, kNan, kNan, total(dot), 0};
  return {largest / 127, given, total(squares), total(dot), kRow == RowIs::key ? total(sum) : 0};
}

template <typename D> RFK_SIMD bool is_finite_row(const D* row, int64_t n) {
  int32_t bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t i = 0; i < n; ++i) {
    const auto v = load(row[i]);
    bad |= !(v - v == 0);
  }
  return !bad;
}

// Decodes row i to numbers, zeros up to `padded`. A token that is not finite becomes NaN as a whole, so that
// an infinity cannot act as a mask.
template <typename D> void decode_row(D* out, const HeadTokens& t, int64_t i, int64_t padded) {
  decode_any(out, t.row(i), t.dtype, t.d);
  if (!is_finite_row(out, t.d)) std::fill(out, out + t.d, store<D>(acc_t<D>(kNan)));
  std::memset(static_cast<void*>(out + t.d), 0, (padded - t.d) * sizeof(D));
}

// Adds to sums [d] what is finite of rows first .. first + count.
void add_finite(float* sums, const HeadTokens& t, int64_t first, int64_t count);

// Packs `count` keys or values from `first` on, a tile. Scales of keys are 0 before, and NaN afterwards for
// those that are not finite, be it in their value: values are packed first.
struct PackFunctions {
  void (*keys)(const PanelLayout& layout, const TilePanels& to, const HeadTokens& k, int64_t first,
               int64_t count, const float* mean, void* scratch);
  void (*values)(const PanelLayout& layout, const TilePanels& to, const HeadTokens& v, int64_t first,
                 int64_t count, void* scratch);
};
PackFunctions pack_functions(Products p);

}  // namespace rfk
