#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/hd.h"
#include "core/rows.h"

// Codes of eight bits for the rows of a tensor: value = code * scale.
//
//   int8, a scale per row:  scale = max(amax, tiny) / 127, code = rint(x 127 / max(amax, tiny)) in -127..127
//   e4m3, a scale per row:  scale = max(amax, tiny) / 448, code = e4m3(x 448 / max(amax, tiny))
//   e4m3, scale given:      code = e4m3(x (1 / scale)), saturated at 448; a NaN or infinity becomes NaN
//
// rounded to nearest even, amax the largest magnitude of the row. A row of zeros has codes 0 and a scale that
// is not zero. A row with a NaN or an infinity has the scale NaN and codes 0: everything made of it is NaN.
//
// Before that the row may be rotated in groups of G = 16, 64 or 256: x H with H = H4 (x) H4 ... / sqrt(G), H4
// = [1 1 1 -1; 1 1 -1 1; 1 -1 1 1; -1 1 1 1], symmetric and its own inverse (ConvRot; QuaRot, Ashkboos et al.
// 2024).

namespace rfk {

enum class Codes : uint8_t { int8, e4m3 };

// Where the codes and scales of a call go.
struct QuantizedRows {
  RowVectors<uint8_t> codes;  // int8 or e4m3
  RowVectors<float> scales;   // one a row
  const float* tensor_scale = nullptr;
  Codes format = Codes::int8;
  int rotation = 0;  // G, or 0
};

// |x| as an integer that grows with it; a NaN is above all numbers.
RFK_HD uint32_t magnitude_bits(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffff; }

// What multiplies a row before it is encoded, and the scale of its codes.
struct RowScale {
  float inverse, scale;
  RFK_HD bool finite() const { return scale == scale; }
};

RFK_HD RowScale row_scale(uint32_t amax_bits, Codes format) {
  constexpr float kTiny = 1e-28f;  // keeps 448 / amax finite
  if (amax_bits >= 0x7f800000) return {0, NAN};
  const float amax = std::bit_cast<float>(amax_bits), top = amax > kTiny ? amax : kTiny;
  const float limit = format == Codes::int8 ? 127.0f : 448.0f;
  return {limit / top, top / limit};
}

// rint(x) for |x| < 2^22, to nearest even
RFK_HD int32_t round_even(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its unit in the last place is one
  return std::bit_cast<int32_t>(x + kMagic) - std::bit_cast<int32_t>(kMagic);
}

RFK_HD uint8_t encode_int8(float x) {  // |x| <= 127.0001
  return uint8_t(int8_t(round_even(x)));
}

// e4m3fn: bias 7, three bits of mantissa, largest 448, no infinity, NaN 0x7f.
RFK_HD uint8_t encode_e4m3(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 24) & 0x80;
  uint32_t magnitude = u & 0x7fffffff;
  const bool finite = magnitude < 0x7f800000;
  magnitude = magnitude < 0x43e00000 ? magnitude : 0x43e00000;  // 448
  const uint32_t scaled = magnitude - (120u << 23);
  const uint32_t normal = (scaled + 0x7ffff + ((scaled >> 20) & 1)) >> 20;
  // 16384.0f has a last bit of 2^-9, the smallest e4m3: adding it rounds a subnormal to even.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 16384.0f) - std::bit_cast<uint32_t>(16384.0f);
  const uint32_t code = magnitude < 0x3c800000 ? subnormal : normal;  // 2^-6
  return uint8_t(finite ? sign | code : 0x7f);
}

RFK_HD float decode_e4m3(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80) << 24, magnitude = code & 0x7f;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t subnormal = std::bit_cast<uint32_t>(float(int32_t(magnitude)) * 0x1p-9f);
  const uint32_t finite = detail::choose(magnitude < 8, subnormal, normal);
  return std::bit_cast<float>(sign | detail::choose(magnitude == 0x7f, 0x7fc00000, finite));
}

RFK_HD uint8_t encode(float x, Codes format) {
  return format == Codes::int8 ? encode_int8(x) : encode_e4m3(x);
}

}  // namespace rfk
