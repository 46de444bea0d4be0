#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "core/hd.h"

namespace rfk {

enum class DType : uint8_t { f64, f32, f16, bf16, i64, i32, i8, u8 };  // u8: fp8 codes too

inline int size_of(DType t) {
  constexpr int kSizes[] = {8, 4, 2, 2, 8, 4, 1, 1};
  return kSizes[int(t)];
}

inline const char* name_of(DType t) {
  constexpr const char* kNames[] = {"f64", "f32", "f16", "bf16", "i64", "i32", "i8", "u8"};
  return kNames[int(t)];
}

inline bool is_floating(DType t) {
  return t == DType::f64 || t == DType::f32 || t == DType::f16 || t == DType::bf16;
}

// The dtype of per-row scalars and accumulators for a tensor of dtype `t`.
inline DType acc_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// 16-bit storage types. Arithmetic never happens in them: load() widens to the
// accumulator type, store<T>() rounds to nearest even, and nothing else exists.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// The type that arithmetic on a T is done in.
template <typename T> struct AccOf {
  using type = float;
};
template <> struct AccOf<double> {
  using type = double;
};
template <typename T> using acc_t = typename AccOf<T>::type;

RFK_HD double load(double v) { return v; }
RFK_HD float load(float v) { return v; }

// The host halves are integer code without branches, in words of 32 bits until memory is touched: GCC 12
// leaves _Float16 scalar and mixed widths at half speed, but turns these into SIMD for every instruction set.
namespace detail {

// condition ? a : b without control flow, of which GCC makes copies of all that follows.
RFK_HD uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  const uint32_t mask = 0 - uint32_t(condition);
  return (a & mask) | (b & ~mask);
}

RFK_HD float value_of_f16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal = std::bit_cast<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t special = (magnitude << 13) | 0x7f800000;
  const uint32_t finite = choose(magnitude < 0x0400, subnormal, normal);
  return std::bit_cast<float>(sign | choose(magnitude >= 0x7c00, special, finite));
}

RFK_HD uint32_t bits_of_f16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  const uint32_t scaled = magnitude - (112u << 23);
  const uint32_t normal = (scaled + 0x0fff + ((scaled >> 13) & 1)) >> 13;
  // 0.5f has a last bit of 2^-24, the smallest f16: adding it rounds a subnormal to even.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t finite = choose(magnitude < 0x38800000, subnormal, normal);
  const uint32_t large = choose(magnitude > 0x7f800000, 0x7fff, 0x7c00);
  return sign | choose(magnitude >= 0x477ff000, large, finite);
}

RFK_HD uint32_t bits_of_bf16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return choose(v == v, rounded, 0x7fff);  // a NaN must not round up to infinity
}

}  // namespace detail

RFK_HD float load(bf16 v) { return std::bit_cast<float>(uint32_t(v.bits) << 16); }

RFK_HD float load(f16 v) {
#ifdef __CUDA_ARCH__
  return __half2float(std::bit_cast<__half>(v.bits));
#else
  return detail::value_of_f16(v.bits);
#endif
}

template <typename T> RFK_HD T store(acc_t<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
#ifdef __CUDA_ARCH__
    return {std::bit_cast<uint16_t>(__float2bfloat16_rn(v))};
#else
    return {uint16_t(detail::bits_of_bf16(v))};
#endif
  } else if constexpr (std::is_same_v<T, f16>) {
#ifdef __CUDA_ARCH__
    return {std::bit_cast<uint16_t>(__float2half_rn(v))};
#else
    return {uint16_t(detail::bits_of_f16(v))};
#endif
  } else {
    return v;
  }
}

// v as it is when it has been stored as a T.
template <typename T, typename A> RFK_HD A rounded_to(A v) {
#ifndef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, bf16>) return std::bit_cast<float>(detail::bits_of_bf16(v) << 16);
  if constexpr (std::is_same_v<T, f16>) return detail::value_of_f16(detail::bits_of_f16(v));
#endif
  return load(store<T>(v));
}

}  // namespace rfk
