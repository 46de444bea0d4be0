#pragma once

#include "attention/copy.cuh"
#include "attention/softmax.cuh"

// The two products of a tile of keys, for the rows of a warp.

namespace rfk {

template <typename Kind, int D> struct KernelTile {
  static constexpr AttentionTile kTile = attention_tile(D, Kind::kScoreBytes, Kind::kValueBytes, Kind::kKeys);
  static_assert(kTile.d == D && kTile.shared() <= kMostShared);
  static constexpr int kPieces = kTile.pieces, kKeys = kTile.keys, kThreads = 32 * kWarps,
                       kSlots = kTile.slots;
  using Outputs = float[kPieces][D / 8][4];
};

// scores = Q K^T of the warp's rows; of codes they are times the scale of their key
template <typename Kind, int D, int Keys, int Pieces>
__device__ __forceinline__ void multiply_keys(Scores<Pieces, Keys>& s, const uint8_t* q,
                                              const uint8_t* slot) {
  constexpr AttentionTile kTile = KernelTile<Kind, D>::kTile;
  constexpr bool kCoded = Kind::kScoreBytes == 1;
  using Sum = std::conditional_t<kCoded, int32_t, float>;
  const int lane = int(opaque(threadIdx.x) % 32);
  constexpr int kPitch = kTile.score_pitch;
  const uint8_t* const a_row = q + lane % 16 * kPitch;
  const uint8_t* const b_row = slot + (lane % 8 + lane / 16 * 8) * kPitch;
  Sum sums[Pieces][Keys / 8][4];
#pragma unroll
  for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4 * Pieces; ++i) sums[i / 4][j][i % 4] = kCoded ? kMagicBits : 0;
  // Codes leave no registers for more than a step at a time.
#pragma unroll(kCoded ? 1 : 16)
  for (int step = 0; step < D * Kind::kScoreBytes / 32; ++step) {
    uint32_t a[Pieces][4];
#pragma unroll
    for (int i = 0; i < Pieces; ++i)
      ldmatrix_x4(a[i], a_row + 16 * i * kPitch + piece_of_row<kPitch>(lane, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < Keys / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, b_row + 8 * j * kPitch + piece_of_row<kPitch>(lane, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t keys[2] = {b[2 * n], b[2 * n + 1]};
#pragma unroll
        for (int i = 0; i < Pieces; ++i) {
          if constexpr (kCoded)
            mma_s8(sums[i][j + n], a[i], keys, sums[i][j + n]);
          else
            mma_16<typename Kind::Element>(sums[i][j + n], a[i], keys);
        }
      }
    }
  }
  const float2* const scales = reinterpret_cast<const float2*>(slot + kTile.scales) + lane % 4;
#pragma unroll
  for (int j = 0; j < Keys / 8; ++j) {
    float2 scale = {1, 1};
    if constexpr (kCoded) scale = scales[4 * j];
#pragma unroll
    for (int i = 0; i < 4 * Pieces; ++i) {
      if constexpr (kCoded)
        s[i / 4][j][i % 4] = without_magic(sums[i / 4][j][i % 4]) * (i % 2 ? scale.y : scale.x);
      else
        s[i / 4][j][i % 4] = sums[i / 4][j][i % 4];
    }
  }
}

// o += P V, weights and values of 16 bits
template <typename Kind, int D, int Keys, int Pieces>
__device__ __forceinline__ void multiply_values(float (&o)[Pieces][D / 8][4],
                                                const Weights<Kind, Keys> (&p)[Pieces], const uint8_t* slot) {
  constexpr int kPitch = KernelTile<Kind, D>::kTile.value_pitch;
  const int lane = int(opaque(threadIdx.x) % 32);
  const uint8_t* const row = slot + lane % 16 * kPitch;
#pragma unroll
  for (int step = 0; step < Keys / 16; ++step)
#pragma unroll
    for (int c = 0; c < D / 8; c += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, row + 16 * step * kPitch + piece_of_row<kPitch>(lane, c + lane / 16));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t channels[2] = {b[2 * n], b[2 * n + 1]};
#pragma unroll
        for (int i = 0; i < Pieces; ++i) mma_16<typename Kind::Element>(o[i][c + n], p[i][step], channels);
      }
    }
}

// The same of eight bits: the sum of a tile is exact, or in the tensor core's own precision, before it is
// scaled and added. A load has 64 keys of 8 channels, or 32 of 16.
template <typename Kind, int D, int Keys, int Pieces>
__device__ __forceinline__ void multiply_codes(float (&o)[Pieces][D / 8][4],
                                               const Weights<Kind, Keys> (&p)[Pieces], const uint8_t* slot,
                                               const OfRows<Pieces>& added) {
  constexpr AttentionTile kTile = KernelTile<Kind, D>::kTile;
  constexpr bool kInt8 = Kind::kValues == Values::int8;
  constexpr int kTogether = 64 / Keys;
  using Sum = std::conditional_t<kInt8, int32_t, float>;
  const int lane = int(opaque(threadIdx.x) % 32), piece = lane / 8 % (Keys / 16),
            channel = lane % 8 + lane / 8 / (Keys / 16) * 8;
  const uint8_t* const row = slot + channel * kTile.value_pitch + piece * 16;
  const float2* const scales = reinterpret_cast<const float2*>(slot + kTile.scales) + lane % 4;
#pragma unroll
  for (int c = 0; c < D / 8; c += kTogether) {
    uint32_t b[4];
    // Found by what spills: the narrow heads need it on sm_120 as well.
    if (kInt8 && c % 2 == 0) D <= 96 ? __syncwarp() : fence_products();
    ldmatrix_x4(b, opaque(row + 8 * c * kTile.value_pitch));
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const float2 scale = scales[4 * (c + n)];
#pragma unroll
      for (int i = 0; i < Pieces; ++i) {
        constexpr Sum kZero = kInt8 ? kMagicBits : 0;
        Sum sum[4] = {kZero, kZero, kZero, kZero};
#pragma unroll
        for (int step = 0; step < Keys / 32; ++step) {
          const uint32_t channels[2] = {b[2 * (n + step)], b[2 * (n + step) + 1]};
          if constexpr (kInt8)
            mma_u8s8(sum, p[i][step], channels, sum);
          else
            mma_e4m3(sum, p[i][step], channels, sum);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float of_channel = e % 2 ? scale.y : scale.x;
          float& to = o[i][c + n][e];
          if constexpr (kInt8)
            to = std::fma(without_magic(sum[e]) * of_channel, added[i][e / 2], to);
          else
            to = std::fma(sum[e], of_channel, to);
        }
      }
    }
  }
}

}  // namespace rfk
