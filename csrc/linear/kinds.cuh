#pragma once

#include "core/slab.cuh"
#include "linear/decode.cuh"
#include "linear/tile_choice.h"

// The kinds of operands that a tensor core multiplies, and how a lane takes its part of a slab
// (core/slab.cuh): 64 bytes of every row of x, and the same inputs of every row of the weight.

namespace rfk {

// XBytes of an element of x, WeightBytes of a row of the weight in a slab, RowBytes that a stage holds of a
// row beside the weight.
template <typename Sum, int XBytes, int WeightBytes, int RowBytes = 0> struct KindBase {
  using Acc = Sum;
  static constexpr int kXBytes = XBytes, kWeightBytes = WeightBytes, kRowBytes = RowBytes;
  static constexpr int kInputs = 64 / XBytes;  // of a slab
  static constexpr bool kByGroup = false;      // sums are scaled group by group
  static constexpr float kFactor = 1;          // of the sum
  using Wide = WideTile;

  // Where a 16-byte piece of a row lies in shared memory.
  static __device__ int x_piece(int row, int piece) { return 64 * row + 16 * piece; }
  static __device__ int weight_piece(int slot, int piece) { return WeightBytes * slot + 16 * piece; }

  static __device__ XFragment load_x(const uint8_t* x, int row, int lane) {
    return load_x_slab(x, row, lane);
  }
  static __device__ WeightFragment load_whole_weight(const uint8_t* weight, int slot, int lane) {
    return load_weight_slab(weight, slot, lane);
  }
};

// int8 x int8
struct Int8Int8 : KindBase<int32_t, 1, 64> {
  static __device__ WeightFragment load_weight(const uint8_t* weight, const uint8_t*, int slot, int lane) {
    return load_whole_weight(weight, slot, lane);
  }
  static __device__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const int32_t (&c)[4]) {
    mma_s8(d, a, b, c);
  }
};

// int8 x four bits. Step h has the inputs 32 h .. 32 h + 31 of the slab, so that a group of 32 is one step:
// lane 4 g + t takes 8 of them from either half of a row, and pieces are exchanged so that these loads meet
// no two in a bank. Weights become 16 (q - 8).
template <bool ByGroup>
struct Int8Int4 : KindBase<std::conditional_t<ByGroup, float, int32_t>, 1, 32, ByGroup ? 8 : 0> {
  using Wide = std::conditional_t<ByGroup, HalfWideTile, WideTile>;
  static constexpr bool kByGroup = ByGroup;
  static constexpr float kFactor = ByGroup ? 1.0f : 1.0f / 16;

  static __device__ int x_piece(int row, int piece) { return 64 * row + 16 * (piece ^ (row & 2)); }
  static __device__ int weight_piece(int slot, int piece) {
    return 32 * slot + 16 * (piece ^ (slot >> 2 & 1));
  }
  static __device__ void load_row(const uint8_t* x, int row, int t, uint32_t (&words)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint2 v = *reinterpret_cast<const uint2*>(x + x_piece(row, 2 * h + t / 2) + 8 * (t % 2));
      words[2 * h] = byte_permute(v.x, v.y, 0x6420);
      words[2 * h + 1] = byte_permute(v.x, v.y, 0x7531);
    }
  }
  static __device__ XFragment load_x(const uint8_t* x, int row, int lane) {
    uint32_t top[4], bottom[4];
    load_row(x, row + lane / 4, lane % 4, top);
    load_row(x, row + lane / 4 + 8, lane % 4, bottom);
    return x_fragment(top, bottom);
  }
  static __device__ WeightFragment load_weight(const uint8_t* weight, const uint8_t*, int slot, int lane) {
    WeightFragment f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t* codes = weight + weight_piece(slot + lane / 4, h) + 4 * (lane % 4);
      decode_int4_to_int8(*reinterpret_cast<const uint32_t*>(codes), f.step[h][0], f.step[h][1]);
    }
    return f;
  }
  static __device__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const int32_t (&c)[4]) {
    mma_s8(d, a, b, c);
  }
};

// e4m3 x e4m3. Tensor cores may keep fewer bits than float while they add: the sum of a slab, 64 products, is
// added to the whole in float.
struct E4m3E4m3 : KindBase<float, 1, 64> {
  using Wide = HalfWideTile;  // sm_80 and sm_90 multiply codes as f16, twice the registers
  static __device__ WeightFragment load_weight(const uint8_t* weight, const uint8_t*, int slot, int lane) {
    return load_whole_weight(weight, slot, lane);
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4]) {
    mma_e4m3(d, a, b, c);
  }
};

constexpr int bytes_beside_16_bit(Storage storage) {  // of a row of the weight in a slab of 32 inputs
  return storage == Storage::floating ? 64 : storage == Storage::int4 ? 16 : 32;
}

// f16 or bf16, T, with weights of any storage that become T, exactly. Of four-bit codes these are q - zero;
// the scale of a group is that of the sum of a slab. A stage holds `minus_zero` of its rows, then scales,
// then offsets.
template <typename T, Storage S>
struct Floating : KindBase<float, 2, bytes_beside_16_bit(S), S == Storage::int4 ? 12 : 0> {
  using Base = KindBase<float, 2, bytes_beside_16_bit(S), S == Storage::int4 ? 12 : 0>;
  using Element = T;
  using Wide = std::conditional_t<S == Storage::int4, HalfWideTile, WideTile>;
  static constexpr bool kByGroup = S == Storage::int4;

  static __device__ XFragment load_x(const uint8_t* x, int row, int lane) {
    if constexpr (S != Storage::int4) return Base::load_x(x, row, lane);
    const uint4 a = load_words(x + 64 * row + 16 * lane), b = load_words(x + 64 * (row + 8) + 16 * lane);
    uint32_t top[4] = {a.x, a.y, a.z, a.w}, bottom[4] = {b.x, b.y, b.z, b.w};
    order_like_int4(top);
    order_like_int4(bottom);
    return x_fragment(top, bottom);
  }
  static __device__ WeightFragment load_weight(const uint8_t* weight, const uint8_t* rows, int slot,
                                               int lane) {
    if constexpr (S == Storage::floating) {
      return Base::load_whole_weight(weight, slot, lane);
    } else if constexpr (S == Storage::int4) {
      const uint32_t codes = *reinterpret_cast<const uint32_t*>(weight + 16 * slot + 4 * lane);
      uint32_t pairs[4];
      decode_int4<T>(codes, reinterpret_cast<const uint32_t*>(rows)[slot + lane / 4], pairs);
      return {{{pairs[0], pairs[1]}, {pairs[2], pairs[3]}}};
    } else {
      const uint2 codes = *reinterpret_cast<const uint2*>(weight + 32 * slot + 8 * lane);
      WeightFragment f;
      if constexpr (S == Storage::int8) {
        decode_int8<T>(codes.x, f.step[0]);
        decode_int8<T>(codes.y, f.step[1]);
      } else {
        decode_e4m3<T>(codes.x, f.step[0]);
        decode_e4m3<T>(codes.y, f.step[1]);
      }
      return f;
    }
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4]) {
    if constexpr (kIsBf16<T>)
      mma_bf16(d, a, b, c);
    else
      mma_f16(d, a, b, c);
  }
};

// f16 or bf16 with blocks of GGUF, decoded and rounded to T on their way into a stage: a slab is 32 numbers
// of a row, which are of one block.
template <typename T> struct Decoded : Floating<T, Storage::floating> {
  using Wide = HalfWideTile;
};
template <typename Kind> inline constexpr bool kIsDecoded = false;
template <typename T> inline constexpr bool kIsDecoded<Decoded<T>> = true;

}  // namespace rfk
