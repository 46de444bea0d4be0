#pragma once

#include "core/quantize.h"
#include "core/stream_store.h"

namespace rfk {

// out[c] = f(c) for c < n, past the cache where the whole result is large (core/stream_store.h);
// before(strip, end) is called ahead of every strip of columns.
template <typename T, typename F, typename G>
RFK_HD void write_row(T* out, int64_t n, bool past_cache, F f, G before) {
  constexpr int64_t kStrip = 256;
  alignas(64) T buffer[kStrip];
  for (int64_t strip = 0; strip < n; strip += kStrip) {
    const int64_t count = std::min(kStrip, n - strip);
    before(strip, strip + count);
    T* const to = past_cache ? buffer : out + strip;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) to[c] = f(strip + c);
    if (past_cache) stream_store(out + strip, buffer, count * sizeof(T));
  }
}

template <typename T, typename F> RFK_HD void write_row(T* out, int64_t n, bool past_cache, F f) {
  write_row(out, n, past_cache, f, [](int64_t, int64_t) __attribute__((always_inline)) {});
}

// A result of `bytes` whose rows may be written past the cache.
template <typename T> bool streams(const RowVectors<T>& out, int axes, int64_t rows, int64_t cols) {
  bool aligned = cols * sizeof(T) % 16 == 0;
  for (int a = 0; a < axes; ++a) aligned &= out.stride[a] * sizeof(T) % 16 == 0;
  return aligned && out.data && should_stream(out.data, rows * cols * sizeof(T));
}

// One base-4 digit of the position: H4 / 2 is half the sum of the four minus the one with both bits flipped.
template <int64_t kStride, typename A> RFK_HD void rotate_digit(A* v, int64_t n) {
  const auto four = [](A* w) __attribute__((always_inline)) {
    const A a = w[0], b = w[kStride], c = w[2 * kStride], d = w[3 * kStride];
    const A half = ((a + b) + (c + d)) * A(0.5);
    w[0] = half - d;
    w[kStride] = half - c;
    w[2 * kStride] = half - b;
    w[3 * kStride] = half - a;
  };
  if constexpr (kStride == 1) {  // neighbours: one loop, which GCC turns into permutations
#pragma omp simd
    for (int64_t base = 0; base < n; base += 4 * kStride) four(v + base);
  } else {
    for (int64_t base = 0; base < n; base += 4 * kStride)
#pragma omp simd
      for (int64_t i = 0; i < kStride; ++i) four(v + base + i);
  }
}

// v H in place, in groups of `rotation`.
template <typename A> RFK_HD void rotate_row(A* v, int64_t n, int rotation) {
  rotate_digit<1>(v, n);
  rotate_digit<4>(v, n);
  if (rotation >= 64) rotate_digit<16>(v, n);
  if (rotation >= 256) rotate_digit<64>(v, n);
}

template <Codes kFormat, typename A>
RFK_HD void encode_row(uint8_t* codes, const A* v, int64_t n, float inverse, bool past_cache) {
  write_row(codes, n, past_cache,
            [=](int64_t c) __attribute__((always_inline)) { return encode(float(v[c]) * inverse, kFormat); });
}

// Encodes the row v[n], which it may overwrite; `scale` is null where the tensor has one.
template <typename A>
RFK_HD void quantize_row(const QuantizedRows& q, uint8_t* codes, float* scale, A* v, int64_t n,
                         bool past_cache) {
  if (q.rotation) rotate_row(v, n, q.rotation);
  RowScale s{1, 1};
  if (q.tensor_scale) {
    s.inverse = 1 / *q.tensor_scale;
  } else {
    uint32_t amax = 0;
#pragma omp simd reduction(max : amax)
    for (int64_t c = 0; c < n; ++c) {
      const uint32_t m = magnitude_bits(float(v[c]));
      amax = m > amax ? m : amax;
    }
    s = row_scale(amax, q.format);
    *scale = s.scale;
  }
  if (!s.finite())
    write_row(codes, n, past_cache, [](int64_t) __attribute__((always_inline)) { return uint8_t(0); });
  else if (q.format == Codes::int8)
    encode_row<Codes::int8>(codes, v, n, s.inverse, past_cache);
  else
    encode_row<Codes::e4m3>(codes, v, n, s.inverse, past_cache);
}

}  // namespace rfk
