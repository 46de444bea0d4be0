#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "block.h"
#include "core/dtype.h"
#include "core/quantize.h"
#include "cuda.h"
#include "memory.h"

// Stands in for csrc/core/ptx.cuh: the same functions for the CPU. The functions in which a whole warp
// meets have one parameter more, where they were called, for the messages.

namespace rfk {
namespace ptx {

using emulator::kWarp, emulator::Where;

inline void check_aligned(const char* what, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    emulator::fail(std::string(what) + ": an address is not aligned to " + std::to_string(bytes) + " bytes");
}

// Where element e of register i of a lane lies in its matrix. P elements share a register, K = 8 P.
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k32", and for
// place_8x8 the figure of ldmatrix; lane / 4 is their groupID, lane % 4 their threadID_in_group.

struct Place {
  int row, col;
};

template <int P> constexpr Place place_a(int lane, int i, int e) {
  return {lane / 4 + 8 * (i % 2), P * (lane % 4) + e + 4 * P * (i / 2)};
}
template <int P> constexpr Place place_b(int lane, int i, int e) {
  return {P * (lane % 4) + e + 4 * P * i, lane / 4};
}
constexpr Place place_c(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }
constexpr Place place_8x8(int lane, int e) { return {lane / 4, 2 * (lane % 4) + e}; }

// The inverse: which lane holds an element, in which register, how many bits up.
struct Holder {
  int lane, i, shift;
};
template <int Rows, int Cols> using Holders = std::array<std::array<Holder, Cols>, Rows>;

template <int P, int Rows, int Cols>
constexpr Holders<Rows, Cols> invert(Place (*place)(int lane, int i, int e)) {
  Holders<Rows, Cols> holders{};
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < Rows * Cols / P / kWarp; ++i)
      for (int e = 0; e < P; ++e) {
        const auto [row, col] = place(lane, i, e);
        holders[row][col] = {lane, i, 32 / P * e};
      }
  return holders;
}

// Elements are decoded from the low bits of their argument.
template <typename T> struct Half {
  static constexpr int kPerRegister = 2;
  static double decode(uint32_t bits) { return load(T{uint16_t(bits)}); }
};
struct S8 {
  static constexpr int kPerRegister = 4;
  static int64_t decode(uint32_t bits) { return int8_t(bits); }
};
struct U8S8 {  // a is unsigned
  static constexpr int kPerRegister = 4;
  static int64_t decode_a(uint32_t bits) { return uint8_t(bits); }
  static int64_t decode(uint32_t bits) { return int8_t(bits); }
};
struct E4M3 {  // bias 7, no infinities, one NaN of each sign
  static constexpr int kPerRegister = 4;
  static double decode(uint32_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
    // (1 + mantissa / 8) 2^(exponent - 7), or mantissa / 8 2^-6
    const double magnitude = exponent ? (8 + mantissa) * double(1 << exponent) : 2 * mantissa;
    return (bits & 0x80 ? -magnitude : magnitude) / 1024;
  }
};

template <typename Format> auto decode_a(uint32_t bits) {
  if constexpr (requires { Format::decode_a(bits); })
    return Format::decode_a(bits);
  else
    return Format::decode(bits);
}

// What a lane brings to an mma.
struct Operands {
  uint32_t a[4], b[2];
};

// The calling lane's part of a b + c. Products and sums are exact in int64_t, and within 2^-53 of their
// largest in double; the result is rounded once, where a tensor core may truncate on the way.
template <typename Format, typename A>
__attribute__((no_sanitize_thread))  // reads registers alone
std::array<A, 4> product(const std::array<Operands, kWarp>& all, const std::array<A, 4>& c) {
  constexpr int P = Format::kPerRegister, K = 8 * P;
  static constexpr Holders<16, K> kA = invert<P, 16, K>(place_a<P>);
  static constexpr Holders<K, 8> kB = invert<P, K, 8>(place_b<P>);
  std::array<A, 4> d;
  for (int i = 0; i < 4; ++i) {
    const auto [row, col] = place_c(emulator::lane(), i);
    auto sum = decltype(Format::decode(0))(c[i]);
    for (int k = 0; k < K; ++k) {
      const Holder &a = kA[row][k], &b = kB[k][col];
      sum += decode_a<Format>(all[a.lane].a[a.i] >> a.shift) * Format::decode(all[b.lane].b[b.i] >> b.shift);
    }
    d[i] = A(sum);
  }
  return d;
}

template <typename Format, typename A>
__forceinline__ void mma(A (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const A (&c)[4],
                         const char* what, Where at) {
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto all = emulator::exchange(emulator::kAllLanes, mine, what, at);
  const auto result = product<Format, A>(all, {c[0], c[1], c[2], c[3]});
  for (int i = 0; i < 4; ++i) d[i] = result[i];
}

enum class Order { rows, columns };

template <int Matrices>
__forceinline__ void ldmatrix(uint32_t (&r)[Matrices], const void* row, Order order, const char* what,
                              Where at) {
  const int lane = emulator::lane();
  if (lane < 8 * Matrices) check_aligned(what, row, 16);
  const auto rows = emulator::exchange(emulator::kAllLanes, row, what, at);
  for (int i = 0; i < Matrices; ++i) {
    r[i] = 0;
    for (int e = 0; e < 2; ++e) {
      auto [j, k] = place_8x8(lane, e);
      if (order == Order::columns) std::swap(j, k);
      r[i] |= uint32_t(static_cast<const uint16_t*>(rows[8 * i + j])[k]) << 16 * e;
    }
  }
}

// Indivisible, since a thread runs until it meets others.
inline void check_atomic(const void* p, const void* code) {
  check_aligned("red_add", p, 4);
  emulator::check_access(p, 4, emulator::Access::atomic, code);
}

// Subnormals become zero of the same sign.
inline float flush(float v) {
  return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v;
}

template <typename T> uint32_t add_pair(uint32_t a, uint32_t b) {
  const auto sum = [&](int shift) -> uint32_t {
    return store<T>(load(T{uint16_t(a >> shift)}) + load(T{uint16_t(b >> shift)})).bits;
  };
  return sum(0) | sum(16) << 16;
}

// v as a float of which a rounding to fewer bits gives what that of v would: a last bit that is odd where v
// was not exact.
inline float rounded_to_odd(double v) {
  const float nearest = float(v);
  if (double(nearest) == v || !(std::fabs(nearest) < INFINITY)) return nearest;
  const bool above = std::fabs(double(nearest)) > std::fabs(v);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(nearest) - above) | 1);
}

// Products of 16-bit numbers are exact in double; a sum is where its terms are within 2^31 of each other, and
// beyond that the smaller one is below the last bit of the result by far.
template <typename T> uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int shift) -> uint32_t {
    const double x = load(T{uint16_t(a >> shift)}), y = load(T{uint16_t(b >> shift)});
    return store<T>(rounded_to_odd(x * y + double(load(T{uint16_t(c >> shift)})))).bits;
  };
  return one(0) | one(16) << 16;
}

}  // namespace ptx

__forceinline__ int lane_id() { return emulator::lane(); }

__forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* row, ptx::Where at = ptx::Where::current()) {
  ptx::ldmatrix(r, row, ptx::Order::rows, "ldmatrix_x1", at);
}
__forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row, ptx::Where at = ptx::Where::current()) {
  ptx::ldmatrix(r, row, ptx::Order::rows, "ldmatrix_x2", at);
}
__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row, ptx::Where at = ptx::Where::current()) {
  ptx::ldmatrix(r, row, ptx::Order::rows, "ldmatrix_x4", at);
}
__forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row,
                                       ptx::Where at = ptx::Where::current()) {
  ptx::ldmatrix(r, row, ptx::Order::columns, "ldmatrix_x1_trans", at);
}
__forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row,
                                       ptx::Where at = ptx::Where::current()) {
  ptx::ldmatrix(r, row, ptx::Order::columns, "ldmatrix_x2_trans", at);
}
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                                       ptx::Where at = ptx::Where::current()) {
  ptx::ldmatrix(r, row, ptx::Order::columns, "ldmatrix_x4_trans", at);
}

__forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4], ptx::Where at = ptx::Where::current()) {
  ptx::check_aligned("stmatrix_x4", row, 16);
  const auto rows = emulator::exchange(emulator::kAllLanes, row, "stmatrix_x4", at);
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e) {
      const auto [j, k] = ptx::place_8x8(emulator::lane(), e);
      static_cast<uint16_t*>(rows[8 * i + j])[k] = uint16_t(r[i] >> 16 * e);
    }
}

template <int Bytes> __forceinline__ void cp_async_zfill(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::copy_async(shared, global, Bytes, valid ? Bytes : 0);
}
template <int Bytes> __forceinline__ void cp_async(void* shared, const void* global) {
  cp_async_zfill<Bytes>(shared, global, true);
}
__forceinline__ void cp_async_commit() { emulator::commit_async(); }
template <int N> __forceinline__ void cp_async_wait() { emulator::wait_async(N); }

__forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], ptx::Where at = ptx::Where::current()) {
  ptx::mma<ptx::Half<f16>>(d, a, b, c, "mma_f16", at);
}
__forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const float (&c)[4], ptx::Where at = ptx::Where::current()) {
  ptx::mma<ptx::Half<bf16>>(d, a, b, c, "mma_bf16", at);
}
__forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            const int32_t (&c)[4], ptx::Where at = ptx::Where::current()) {
  ptx::mma<ptx::S8>(d, a, b, c, "mma_s8", at);
}
__forceinline__ void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const int32_t (&c)[4], ptx::Where at = ptx::Where::current()) {
  ptx::mma<ptx::U8S8>(d, a, b, c, "mma_u8s8", at);
}
__forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              const float (&c)[4], ptx::Where at = ptx::Where::current()) {
  ptx::mma<ptx::E4M3>(d, a, b, c, "mma_e4m3", at);
}

__attribute__((noinline, no_sanitize_thread)) inline void red_add(float* p, float v) {
  ptx::check_atomic(p, __builtin_return_address(0));
  *p = ptx::flush(ptx::flush(*p) + ptx::flush(v));
}
__attribute__((noinline, no_sanitize_thread)) inline void red_add_f16x2(uint32_t* p, uint32_t v) {
  ptx::check_atomic(p, __builtin_return_address(0));
  *p = ptx::add_pair<f16>(*p, v);
}
__attribute__((noinline, no_sanitize_thread)) inline void red_add_bf16x2(uint32_t* p, uint32_t v) {
  ptx::check_atomic(p, __builtin_return_address(0));
  *p = ptx::add_pair<bf16>(*p, v);
}

inline constexpr bool kMultipliesE4m3 = true;

__forceinline__ void fence_products() {}

__forceinline__ uint32_t round_to_f16x2(float low, float high) {
  return store<f16>(low).bits | uint32_t(store<f16>(high).bits) << 16;
}
__forceinline__ uint32_t round_to_bf16x2(float low, float high) {
  return store<bf16>(low).bits | uint32_t(store<bf16>(high).bits) << 16;
}
__forceinline__ uint32_t round_to_e4m3x2(float low, float high) {
  return encode_e4m3(low) | uint32_t(encode_e4m3(high)) << 8;
}

__forceinline__ float exp2_approx(float x) { return ptx::flush(std::exp2(ptx::flush(x))); }

template <typename T> T opaque(T v) { return v; }

__forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15;
    const uint32_t byte = bytes >> 8 * (choice & 7) & 0xff;
    result |= (choice & 8 ? byte / 128 * 255 : byte) << 8 * i;
  }
  return result;
}

template <uint8_t Table> __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int bit = 0; bit < 32; ++bit) {
    const int at = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1);
    result |= uint32_t(Table >> at & 1) << bit;
  }
  return result;
}

__forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) { return ptx::fma_pair<f16>(a, b, c); }
__forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return ptx::fma_pair<bf16>(a, b, c);
}

inline void named_barrier_sync(int id, int threads, emulator::Where at = emulator::Where::current()) {
  emulator::barrier(id, threads, emulator::Vote::none, false, "bar.sync", at);
}

}  // namespace rfk
