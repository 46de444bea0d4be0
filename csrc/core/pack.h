#pragma once

#include <cstring>

#include "core/quantize.h"
#include "core/tensor.h"
#include "core/tiles.h"

// Panels for the tiles of tiles.h: rows are decoded to the numbers of the product, then interleaved.

namespace rfk {

// Everything in a workspace begins at a multiple of a line.
inline constexpr int64_t kLine = 64;  // bytes

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t lines(int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }

inline char* first_line(const TensorView& workspace) {
  const auto base = reinterpret_cast<uintptr_t>(workspace.data);
  return reinterpret_cast<char*>((base + kLine - 1) / kLine * kLine);
}

// Memory of a workspace, handed out piece by piece.
struct Arena {
  char* at;
  template <typename T> T* take(int64_t bytes) {
    T* piece = reinterpret_cast<T*>(at);
    at += lines(bytes);
    return piece;
  }
};

// What a product multiplies, the word that holds them, and what sums become.
template <typename N, typename W = uint32_t, typename Acc = float> struct NumbersOf {
  using Number = N;
  using Word = W;
  using A = Acc;
};
template <Product P> struct Numbers;
template <> struct Numbers<Product::int8> : NumbersOf<int8_t> {};
template <> struct Numbers<Product::bf16> : NumbersOf<bf16> {};
template <> struct Numbers<Product::f32> : NumbersOf<float> {};
template <> struct Numbers<Product::f64> : NumbersOf<double, uint64_t, double> {};

// A stored form that is no C++ number.
struct e4m3 {
  uint8_t bits;
};

template <typename S> struct Source {
  const S* row;
  RFK_HD auto operator[](int64_t i) const { return load(row[i]); }
};
template <> struct Source<int8_t> {
  const int8_t* row;
  RFK_HD float operator[](int64_t i) const { return float(int32_t(row[i])); }
};
template <> struct Source<e4m3> {
  const e4m3* row;
  RFK_HD float operator[](int64_t i) const { return decode_e4m3(row[i].bits); }
};

// out[i] = row[i] in the numbers of the product; bf16 from wider numbers is rounded to even.
template <typename D, typename S> RFK_SIMD void decode_row(D* out, const S* row, int64_t count) {
  const Source<S> source{row};
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = store<D>(acc_t<D>(source[i]));
}

// int8 as unsigned bytes that are 128 larger
RFK_SIMD inline void offset_row(int8_t* out, const char* row, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = int8_t(row[i] ^ 0x80);
}

RFK_SIMD inline int32_t sum_row(const int8_t* row, int64_t count) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += row[i];
  return sum;
}

// out[i] = code i - zero
template <typename D> RFK_SIMD void decode_int4(D* out, const uint8_t* row, int zero, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) {
    const int low = (row[i] & 15) - zero, high = (row[i] >> 4) - zero;
    if constexpr (std::is_same_v<D, int8_t>) {
      out[2 * i] = int8_t(low);
      out[2 * i + 1] = int8_t(high);
    } else {
      out[2 * i] = store<D>(acc_t<D>(low));
      out[2 * i + 1] = store<D>(acc_t<D>(high));
    }
  }
}

// Decodes a row of any floating dtype, or of codes of eight bits.
template <typename D> void decode_any(D* out, const void* row, DType dtype, int64_t count) {
  const auto from = [&]<typename S>(S) { decode_row<D, S>(out, static_cast<const S*>(row), count); };
  if constexpr (std::is_same_v<D, bf16>)
    if (dtype == DType::bf16) return void(std::memcpy(out, row, count * sizeof(bf16)));
  switch (dtype) {
    case DType::f64: return from(double{});
    case DType::f32: return from(float{});
    case DType::f16: return from(f16{});
    case DType::bf16: return from(bf16{});
    case DType::i8: return from(int8_t{});
    default: return from(e4m3{});
  }
}

// `count` numbers of a tensor from element `at` on.
template <typename D> void decode_any(D* out, const TensorView& from, int64_t at, int64_t count) {
  decode_any(out, static_cast<const char*>(from.data) + at * size_of(from.dtype), from.dtype, count);
}

// out[step][row] = in[row][step]; `rows` is a multiple of 4.
template <typename Word> void interleave(Word* out, const Word* in, int64_t stride, int rows, int64_t steps) {
  using Four = uint32_t __attribute__((vector_size(16)));
  int64_t done = 0;
  if constexpr (sizeof(Word) == 4) {
    done = steps / 4 * 4;
    for (int64_t s = 0; s < done; s += 4) {
      for (int r = 0; r < rows; r += 4) {
        Four v[4];
        for (int i = 0; i < 4; ++i) std::memcpy(&v[i], in + (r + i) * stride + s, 16);
        const Four a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
        const Four b = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
        const Four c = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
        const Four d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
        const Four to[4] = {
            __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
            __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
        for (int i = 0; i < 4; ++i) std::memcpy(out + (s + i) * rows + r, &to[i], 16);
      }
    }
  }
  for (int64_t s = done; s < steps; ++s)
    for (int r = 0; r < rows; ++r) out[s * rows + r] = in[r * stride + s];
}

}  // namespace rfk
