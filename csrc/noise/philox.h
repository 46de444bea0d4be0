#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/hd.h"

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// Box-Muller transform, with logarithm, sine and cosine written out: the libraries of the two back
// ends differ in the last bit, additions and multiplications do not.

namespace rfk {

// Four uniform 32-bit words for counter c and key k; c is replaced by them.
RFK_HD void philox4x32(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// ln(x) for normal x > 0, within 1 ulp: x = 2^k m, m in [sqrt(1/2), sqrt(2)), and the series of
// ln((1 + s) / (1 - s)) (the algorithm of fdlibm's logf).
RFK_HD float log_normal_range(float x) {
  const uint32_t shifted = std::bit_cast<uint32_t>(x) + (0x3f800000u - 0x3f3504f3u);
  const float k = float(int32_t(shifted >> 23) - 127);
  const float f = std::bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, w = z * z;
  const float series = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const float half = 0.5f * f * f;
  return s * (half + series) + k * 9.0580006145e-06f - half + f + k * 6.9313812256e-01f;
}

struct Pair {
  float first, second;
};

// Two independent N(0, 1) numbers from two uniform words: radius from `a`, angle from `b`.
RFK_HD Pair box_muller(uint32_t a, uint32_t b) {
  const float u = float(a) * 0x1p-32f + 0x1p-33f;  // (0, 1]
  const float radius = std::sqrt(-2.0f * log_normal_range(u));

  // The angle 2 pi b / 2^32, as a quadrant and an offset of at most pi/4 from its axis.
  const uint32_t quadrant = (b + 0x20000000u) >> 30;
  const float y = float(int32_t(b - (quadrant << 30))) * 1.4629180792671596e-09f;
  const float z = y * y;
  const float sine = y + y * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float cosine =
      1.0f - 0.5f * z + z * z * (4.1666645683e-2f + z * (-1.3887316255e-3f + z * 2.4433157118e-5f));
  const bool swap = quadrant & 1;
  const uint32_t flip_cosine = ((quadrant + 1) & 2) << 30, flip_sine = (quadrant & 2) << 30;
  const uint32_t c = std::bit_cast<uint32_t>(swap ? sine : cosine) ^ flip_cosine;
  const uint32_t s = std::bit_cast<uint32_t>(swap ? cosine : sine) ^ flip_sine;
  return {radius * std::bit_cast<float>(c), radius * std::bit_cast<float>(s)};
}

struct NoiseKey {
  uint32_t seed_low, seed_high, sample, step;
};

inline constexpr int kDrawsPerBlock = 4;

// Elements 4 block .. 4 block + 3 of one sample: its words,
RFK_HD void draw(const NoiseKey& key, uint64_t block, uint32_t (&words)[kDrawsPerBlock]) {
  words[0] = uint32_t(block), words[1] = uint32_t(block >> 32), words[2] = key.sample, words[3] = key.step;
  philox4x32(words, key.seed_low, key.seed_high);
}

// or its noise.
RFK_HD void draw(const NoiseKey& key, uint64_t block, float (&normals)[kDrawsPerBlock]) {
  uint32_t words[kDrawsPerBlock];
  draw(key, block, words);
  const Pair p = box_muller(words[0], words[1]), q = box_muller(words[2], words[3]);
  normals[0] = p.first, normals[1] = p.second, normals[2] = q.first, normals[3] = q.second;
}

// The keys of a call, i64[batch, 3] with strides.
struct NoiseKeys {
  const int64_t* data;
  int64_t row_stride, field_stride;

  RFK_HD NoiseKey of(int64_t sample) const {
    const int64_t* row = data + sample * row_stride;
    const uint64_t seed = uint64_t(row[0]);
    return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(row[field_stride]),
            uint32_t(row[2 * field_stride])};
  }
};

}  // namespace rfk
