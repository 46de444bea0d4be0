#pragma once

#include "attention/tile_choice.h"
#include "core/dtype.h"
#include "core/ptx.cuh"

// What the two products of the tensor-core kernels multiply.

namespace rfk {

// 1.5 2^23, and its bits: a sum of integers that starts at these bits is, as a float, 1.5 2^23 + the sum, as
// long as that is below 2^22. 256 products of int8 codes are, and 64 of a byte and a code.
inline constexpr float kMagic = 0x1.8p23f;
inline constexpr int32_t kMagicBits = 0x4b400000;

__device__ __forceinline__ float without_magic(int32_t bits) { return std::bit_cast<float>(bits) - kMagic; }

template <typename T> __device__ __forceinline__ uint32_t round_to_pair(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>)
    return round_to_bf16x2(low, high);
  else
    return round_to_f16x2(low, high);
}

template <typename T>
__device__ __forceinline__ void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>)
    mma_bf16(d, a, b, d);
  else
    mma_f16(d, a, b, d);
}

enum class Values : uint8_t { sixteen, int8, e4m3 };

// Scores of T, values of T.
template <typename T> struct Full {
  using Element = T;  // of values in 16 bits
  static constexpr int kScoreBytes = 2, kValueBytes = 2;
  static constexpr Values kValues = Values::sixteen;
  static constexpr int kKeys = 64;  // of a tile at most
  static constexpr float kTop = 1;  // the largest weight
  static constexpr bool kRuns = true;
};

// Scores of int8 codes.
template <Values V, typename T = bf16> struct Coded {
  using Element = T;
  static constexpr int kScoreBytes = 1, kValueBytes = V == Values::sixteen ? 2 : 1;
  static constexpr Values kValues = V;
  static constexpr int kKeys = V == Values::e4m3 ? 32 : 64;  // of a tile at most
  static constexpr float kTop = V == Values::sixteen ? 1 : V == Values::int8 ? 255 : 448;
  static constexpr bool kRuns = V != Values::e4m3 || kMultipliesE4m3;
};

// Weights of Keys keys as the lanes hold them for the second product: [step of 32 bytes of a row][register].
template <typename Kind, int Keys> using Weights = uint32_t[Keys * Kind::kValueBytes / 32][4];

// Of a lane's scores of 16 rows, [piece of 8 keys][element], weights for the mma: their registers hold what
// the lane has already. Two pieces are the 16 keys of a step in 16 bits. In eight bits four are the 32 of a
// step, whose order is that of the keys of transposed values (key_place).
template <typename Kind, int Keys>
__device__ __forceinline__ void pack_weights(Weights<Kind, Keys>& to, const float (&s)[Keys / 8][4]) {
#pragma unroll
  for (int step = 0; step < Keys * Kind::kValueBytes / 32; ++step)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int e = 2 * (r % 2);  // row of the lane
      if constexpr (Kind::kValues == Values::sixteen) {
        const float (&piece)[4] = s[2 * step + r / 2];
        to[step][r] = round_to_pair<typename Kind::Element>(piece[e], piece[e + 1]);
      } else {
        const float (&low)[4] = s[4 * step + 2 * (r / 2)], (&high)[4] = s[4 * step + 2 * (r / 2) + 1];
        if constexpr (Kind::kValues == Values::e4m3) {
          to[step][r] = byte_permute(round_to_e4m3x2(low[e], low[e + 1]),
                                     round_to_e4m3x2(high[e], high[e + 1]), 0x5410);
        } else {  // the last bytes of what round_weights left
          const auto bits = [](float v) { return std::bit_cast<uint32_t>(v); };
          to[step][r] = byte_permute(byte_permute(bits(low[e]), bits(low[e + 1]), 0x0040),
                                     byte_permute(bits(high[e]), bits(high[e + 1]), 0x0040), 0x5410);
        }
      }
    }
}

// Where key `i` of a tile of 64 lies in a row of transposed values: of 16 keys 8 u + 2 t + e, which lane t
// holds as element e of piece u, byte 4 t + 2 u + e.
RFK_HD constexpr int key_place(int i) { return (i & ~15) | (i & 6) << 1 | (i >> 3 & 1) << 1 | (i & 1); }

}  // namespace rfk
