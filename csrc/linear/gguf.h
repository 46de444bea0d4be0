#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "core/check.h"
#include "core/dtype.h"

// The block types of GGUF files (ggml's, by their names there). Sixteen neighbours of a row share a scale and
// an offset in every type: number i of them is scale * code i + offset, codes int8. The product is exact in
// float where there is an offset, so that the result is rounded once and fused multiply-add gives the same
// bits.

namespace rfk {

enum class Gguf : uint8_t { q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs };

inline Gguf gguf_of(const char* op, const std::string& name) {
  constexpr const char* kNames[] = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",   "Q2_K",
                                    "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  check(found != std::end(kNames), op,
        ": kind must be Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL or IQ4_XS, got ",
        name);
  return Gguf(found - kNames);
}

// Codes of four numbers in a word, the first in its low bits. The offset of types that have none is -0, which
// leaves a zero its sign.
struct Sixteen {
  float scale, offset = -0.0f;
  uint32_t codes[4] = {};
};

namespace gguf {

// Blocks are aligned to 4 bytes if their size is, else to 2.
template <int Numbers, int Bytes> struct Block {
  static constexpr int kNumbers = Numbers, kBytes = Bytes, kAlign = Bytes % 4 ? 2 : 4;

  static RFK_HD uint32_t word(const uint8_t* p) {
    uint32_t w;
    std::memcpy(&w, __builtin_assume_aligned(p, kAlign), sizeof(w));
    return w;
  }
  static RFK_HD uint32_t short_at(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, __builtin_assume_aligned(p, 2), sizeof(bits));
    return bits;
  }
  static RFK_HD float half(const uint8_t* p) { return load(f16{uint16_t(short_at(p))}); }
};

// Bytes 0 .. 127 of a word less `c`, as int8.
RFK_HD uint32_t minus(uint32_t bytes, uint32_t c) {
  return ((bytes | 0x80808080) - 0x01010101 * c) ^ 0x80808080;
}

// The low four bits, 16 times each, in a byte each.
RFK_HD uint32_t fifth_bits(uint32_t bits) { return ((bits & 15) * 0x00204081 & 0x01010101) << 4; }

RFK_HD uint32_t nibbles(uint32_t w, int high) { return w >> 4 * high & 0x0f0f0f0f; }

// Four-bit codes of the non-linear types as their int8.
RFK_HD uint32_t nonlinear(uint32_t codes) {
  constexpr uint64_t kLow = 0xf6eaddcfbfad9881, kHigh = 0x7159453526190d01;  // -127 .. -10, 1 .. 113
  uint32_t values = 0;
  for (int e = 0; e < 4; ++e) {
    const uint32_t code = codes >> 8 * e & 15;
    values |= uint32_t((code & 8 ? kHigh : kLow) >> 8 * (code & 7) & 255) << 8 * e;
  }
  return values;
}

// Scale and minimum of six bits, number `g` of eight in twelve bytes.
RFK_HD void six_bits(const uint8_t* b, int g, float& scale, float& minimum) {
  const int low = b[g], middle = b[g + 4], before = g < 4 ? 0 : b[g - 4];
  scale = float(g < 4 ? low & 63 : (middle & 15) | before >> 6 << 4);
  minimum = float(g < 4 ? middle & 63 : middle >> 4 | low >> 6 << 4);
}

// Each has decode(b, s): the numbers 16 s .. 16 s + 15 of the block at b.

struct Q4_0 : Block<32, 18> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b)};
    for (int i = 0; i < 4; ++i) v.codes[i] = minus(nibbles(word(b + 2 + 4 * i), s), 8);
    return v;
  }
};

struct Q4_1 : Block<32, 20> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b), .offset = half(b + 2)};
    for (int i = 0; i < 4; ++i) v.codes[i] = nibbles(word(b + 4 + 4 * i), s);
    return v;
  }
};

struct Q5_0 : Block<32, 22> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b)};
    const uint32_t high = word(b + 2) >> 16 * s;
    for (int i = 0; i < 4; ++i)
      v.codes[i] = minus(nibbles(word(b + 6 + 4 * i), s) | fifth_bits(high >> 4 * i), 16);
    return v;
  }
};

struct Q5_1 : Block<32, 24> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b), .offset = half(b + 2)};
    const uint32_t high = word(b + 4) >> 16 * s;
    for (int i = 0; i < 4; ++i) v.codes[i] = nibbles(word(b + 8 + 4 * i), s) | fifth_bits(high >> 4 * i);
    return v;
  }
};

struct Q8_0 : Block<32, 34> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b)};
    for (int i = 0; i < 4; ++i) v.codes[i] = word(b + 2 + 16 * s + 4 * i);
    return v;
  }
};

// The types of 256 numbers have eight groups of 32, in two halves for codes of two bits and six.

struct Q2_K : Block<256, 84> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b + 80) * float(b[s] & 15), .offset = -(half(b + 82) * float(b[s] >> 4))};
    for (int i = 0; i < 4; ++i)
      v.codes[i] = word(b + 16 + 32 * (s / 8) + 16 * (s % 2) + 4 * i) >> (s & 6) & 0x03030303;
    return v;
  }
};

struct Q3_K : Block<256, 110> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    const int low = b[96 + s % 8] >> 4 * (s / 8) & 15, high = b[104 + s % 4] >> 2 * (s / 4) & 3;
    Sixteen v{.scale = half(b + 108) * float((low | high << 4) - 32)};
    for (int i = 0; i < 4; ++i) {
      const uint32_t third = word(b + 16 * (s % 2) + 4 * i) >> s / 2 & 0x01010101;
      const uint32_t two = word(b + 32 + 32 * (s / 8) + 16 * (s % 2) + 4 * i) >> (s & 6) & 0x03030303;
      v.codes[i] = minus(two | third << 2, 4);
    }
    return v;
  }
};

struct Q4_K : Block<256, 144> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    float scale, minimum;
    six_bits(b + 4, s / 2, scale, minimum);
    Sixteen v{.scale = half(b) * scale, .offset = -(half(b + 2) * minimum)};
    for (int i = 0; i < 4; ++i)
      v.codes[i] = nibbles(word(b + 16 + 32 * (s / 4) + 16 * (s % 2) + 4 * i), s / 2 % 2);
    return v;
  }
};

struct Q5_K : Block<256, 176> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    float scale, minimum;
    six_bits(b + 4, s / 2, scale, minimum);
    Sixteen v{.scale = half(b) * scale, .offset = -(half(b + 2) * minimum)};
    for (int i = 0; i < 4; ++i) {
      const uint32_t fifth = word(b + 16 + 16 * (s % 2) + 4 * i) >> s / 2 & 0x01010101;
      v.codes[i] = nibbles(word(b + 48 + 32 * (s / 4) + 16 * (s % 2) + 4 * i), s / 2 % 2) | fifth << 4;
    }
    return v;
  }
};

struct Q6_K : Block<256, 210> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    const int half_block = s / 8, g = s / 2 % 4, part = s % 2;
    Sixteen v{.scale = half(b + 208) * float(int8_t(b[192 + s]))};
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = nibbles(word(b + 64 * half_block + 32 * (g % 2) + 16 * part + 4 * i), g / 2);
      const uint32_t high = word(b + 128 + 32 * half_block + 16 * part + 4 * i) >> 2 * g & 0x03030303;
      v.codes[i] = minus(low | high << 4, 32);
    }
    return v;
  }
};

struct IQ4_NL : Block<32, 18> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    Sixteen v{.scale = half(b)};
    for (int i = 0; i < 4; ++i) v.codes[i] = nonlinear(nibbles(word(b + 2 + 4 * i), s));
    return v;
  }
};

struct IQ4_XS : Block<256, 136> {
  static RFK_HD Sixteen decode(const uint8_t* b, int s) {
    const int g = s / 2, low = b[4 + g / 2] >> 4 * (g % 2) & 15, high = short_at(b + 2) >> 2 * g & 3;
    Sixteen v{.scale = half(b) * float((low | high << 4) - 32)};
    for (int i = 0; i < 4; ++i) v.codes[i] = nonlinear(nibbles(word(b + 8 + 16 * g + 4 * i), s % 2));
    return v;
  }
};

}  // namespace gguf

// Calls f.operator()<B>() with the block of `kind`.
template <typename F> RFK_HD void with_block(Gguf kind, F&& f) {
  switch (kind) {
    case Gguf::q4_0: return f.template operator()<gguf::Q4_0>();
    case Gguf::q4_1: return f.template operator()<gguf::Q4_1>();
    case Gguf::q5_0: return f.template operator()<gguf::Q5_0>();
    case Gguf::q5_1: return f.template operator()<gguf::Q5_1>();
    case Gguf::q8_0: return f.template operator()<gguf::Q8_0>();
    case Gguf::q2_k: return f.template operator()<gguf::Q2_K>();
    case Gguf::q3_k: return f.template operator()<gguf::Q3_K>();
    case Gguf::q4_k: return f.template operator()<gguf::Q4_K>();
    case Gguf::q5_k: return f.template operator()<gguf::Q5_K>();
    case Gguf::q6_k: return f.template operator()<gguf::Q6_K>();
    case Gguf::iq4_nl: return f.template operator()<gguf::IQ4_NL>();
    case Gguf::iq4_xs: return f.template operator()<gguf::IQ4_XS>();
  }
}

// The numbers 16 i .. 16 i + 15 of a row of blocks.
template <typename B> RFK_HD Sixteen sixteen_of(const uint8_t* row, int i) {
  constexpr int kOfBlock = B::kNumbers / 16;
  return B::decode(row + int64_t(i / kOfBlock) * B::kBytes, i % kOfBlock);
}

}  // namespace rfk
