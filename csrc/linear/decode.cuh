#pragma once

#include <type_traits>

#include "core/ptx.cuh"
#include "linear/args.h"
#include "linear/gguf.h"

// Stored weights as operands, in registers. T is f16 or bf16; a register holds two of them, the first in its
// low bits.

namespace rfk {

template <typename T> inline constexpr bool kIsBf16 = std::is_same_v<T, bf16>;

// a b + c of both halves, rounded once
template <typename T> __device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (kIsBf16<T>)
    return fma_bf16x2(a, b, c);
  else
    return fma_f16x2(a, b, c);
}

template <typename T> inline constexpr uint32_t kOnes = kIsBf16<T> ? 0x3f803f80 : 0x3c003c00;

template <typename T> __device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return uint32_t(store<T>(low).bits) | uint32_t(store<T>(high).bits) << 16;
}

// Four int8, exact: two registers in their order.
template <typename T> __device__ __forceinline__ void decode_int8(uint32_t codes, uint32_t* pairs) {
  constexpr uint8_t kAndOr = (0xf0 & 0xcc) | 0xaa;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kIsBf16<T>) {  // (128 + low seven bits) - (128 or 256)
      const uint32_t spread = byte_permute(codes, 0, i ? 0x4342 : 0x4140);
      const uint32_t low = lop3<kAndOr>(spread, 0x007f007f, 0x43004300);
      const uint32_t sign = lop3<kAndOr>(spread, 0x00800080, 0x43004300);
      pairs[i] = fma_pair<T>(sign, 0xbf80bf80, low);
    } else {  // (1024 + (code + 128)) - 1152
      const uint32_t spread = byte_permute(codes ^ 0x80808080, 0x64646464, i ? 0x4342 : 0x4140);
      pairs[i] = fma_pair<T>(spread, kOnes<T>, 0xe480e480);
    }
  }
}

// Sixteen int8
__device__ __forceinline__ void decode_int8(const uint32_t (&words)[4], float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i)  // (2^23 + code + 128) - (2^23 + 128)
    v[i] = std::bit_cast<float>(byte_permute(words[i / 4] ^ 0x80808080, 0x4b000000, 0x7440 + i % 4)) -
           8388736.0f;
}

__device__ __forceinline__ void decode_sixteen(const Sixteen& from, float (&v)[16]) {
  decode_int8(from.codes, v);
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = std::fma(from.scale, v[i], from.offset);
}

// The numbers 16 i .. 16 i + 15 of a row of blocks of a kind that is known at run time, as all threads know
// it.
__device__ __forceinline__ Sixteen sixteen_of(Gguf kind, const uint8_t* row, int i) {
  Sixteen v;
  with_block(kind, [&]<typename B>() { v = sixteen_of<B>(row, i); });
  return v;
}

// Four e4m3, exact: two registers in their order. The seven bits of a magnitude are those of a T that is 2^-8
// (f16) or 2^-120 (bf16) of it, subnormals included; the code of NaN is the one that carries when 1 is added.
template <typename T> __device__ __forceinline__ void decode_e4m3(uint32_t codes, uint32_t* pairs) {
  constexpr int kShift = kIsBf16<T> ? 4 : 1;
  constexpr uint32_t kFactor = kIsBf16<T> ? 0x7b807b80 : 0x5c005c00;
  const uint32_t magnitude = codes & 0x7f7f7f7f, carries = magnitude + 0x01010101;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t spread = byte_permute(magnitude, 0, i ? 0x3424 : 0x1404) >> kShift;
    const uint32_t sign = byte_permute(codes, 0, i ? 0x3424 : 0x1404);
    const uint32_t nan = byte_permute(carries, 0, i ? 0xbbaa : 0x9988);  // all bits, or none: + 0
    constexpr uint8_t kOrAnd = 0xf0 | (0xcc & 0xaa);
    pairs[i] = fma_pair<T>(lop3<kOrAnd>(spread, sign, 0x80008000), kFactor, nan);
  }
}

// What decode_int4 subtracts of its codes, a pair: f16 reads a code q as 1024 + q; bf16, whose 128 + zero
// would not be exact for every zero, takes 8 first.
template <typename T> __device__ __forceinline__ uint32_t minus_zero(float zero) {
  const float minus = kIsBf16<T> ? 8 - zero : -1024 - zero;
  return pair_of<T>(minus, minus);
}

// q - zero of eight four-bit codes q0 .. q7, exact: registers (q0, q4), (q1, q5), (q2, q6), (q3, q7).
// `order_like_int4` puts eight 16-bit neighbours of the other operand into the same order.
template <typename T>
__device__ __forceinline__ void decode_int4(uint32_t codes, uint32_t zero, uint32_t (&pairs)[4]) {
  constexpr uint8_t kAndOr = (0xf0 & 0xcc) | 0xaa;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIsBf16<T>) {  // 128 + q - 136
      const uint32_t shifted = lop3<kAndOr>(codes >> 4 * i, 0x000f000f, 0x43004300);
      pairs[i] = fma_pair<T>(fma_pair<T>(shifted, kOnes<T>, 0xc308c308), kOnes<T>, zero);
    } else {
      pairs[i] = fma_pair<T>(lop3<kAndOr>(codes >> 4 * i, 0x000f000f, 0x64006400), kOnes<T>, zero);
    }
  }
}

__device__ __forceinline__ void order_like_int4(uint32_t (&words)[4]) {
  const uint32_t a = words[0], b = words[1], c = words[2], d = words[3];
  words[0] = byte_permute(a, c, 0x5410);
  words[1] = byte_permute(a, c, 0x7632);
  words[2] = byte_permute(b, d, 0x5410);
  words[3] = byte_permute(b, d, 0x7632);
}

// Eight four-bit codes q0 .. q7 as int8 16 (q - 8): those of even index, those of odd index.
__device__ __forceinline__ void decode_int4_to_int8(uint32_t codes, uint32_t& even, uint32_t& odd) {
  constexpr uint8_t kAndXor = (0xf0 & 0xcc) ^ 0xaa;
  even = lop3<kAndXor>(codes << 4, 0xf0f0f0f0, 0x80808080);
  odd = lop3<kAndXor>(codes, 0xf0f0f0f0, 0x80808080);
}

}  // namespace rfk
