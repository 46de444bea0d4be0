#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "block.h"
#include "memory.h"

// CUDA's device functions on the host. One that is missing here is a compile error that names it.

// --- barriers (CUDA C++ Programming Guide, "Synchronization Functions") ---

using EmulatorWhere = emulator::Where;

#define RFK_BARRIER(name, vote)                                                      \
  inline int name(int predicate, EmulatorWhere at = EmulatorWhere::current()) {      \
    return emulator::barrier(0, 0, emulator::Vote::vote, predicate != 0, #name, at); \
  }
RFK_BARRIER(__syncthreads_or, any)
RFK_BARRIER(__syncthreads_and, all)
RFK_BARRIER(__syncthreads_count, count)
#undef RFK_BARRIER

inline void __syncthreads(EmulatorWhere at = EmulatorWhere::current()) {
  emulator::barrier(0, 0, emulator::Vote::none, false, "__syncthreads", at);
}
inline void __syncwarp(unsigned mask = emulator::kAllLanes, EmulatorWhere at = EmulatorWhere::current()) {
  emulator::sync_warp(mask, at);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

// --- shuffles: the lanes of a segment of `width` read each other's value ---

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              EmulatorWhere at = EmulatorWhere::current()) {
  const auto all = emulator::exchange(mask, value, "__shfl_sync", at);
  return all[(emulator::lane() & ~(width - 1)) + (source & (width - 1))];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 EmulatorWhere at = EmulatorWhere::current()) {
  const auto all = emulator::exchange(mask, value, "__shfl_up_sync", at);
  const int from = (emulator::lane() & (width - 1)) - int(delta);
  return from < 0 ? value : all[emulator::lane() - delta];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   EmulatorWhere at = EmulatorWhere::current()) {
  const auto all = emulator::exchange(mask, value, "__shfl_down_sync", at);
  const int from = (emulator::lane() & (width - 1)) + int(delta);
  return from >= width ? value : all[emulator::lane() + delta];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  EmulatorWhere at = EmulatorWhere::current()) {
  const auto all = emulator::exchange(mask, value, "__shfl_xor_sync", at);
  const int from = emulator::lane() ^ bits;
  return (from ^ emulator::lane()) >= width ? value : all[from];
}

// --- votes, matches and reductions over the lanes of `mask` ---

inline unsigned __ballot_sync(unsigned mask, int predicate, EmulatorWhere at = EmulatorWhere::current()) {
  const auto all = emulator::exchange(mask, predicate, "__ballot_sync", at);
  unsigned votes = 0;
  for (int l = 0; l < emulator::kWarp; ++l) votes |= unsigned(all[l] != 0) << l;
  return votes & mask;
}
inline int __any_sync(unsigned mask, int predicate, EmulatorWhere at = EmulatorWhere::current()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EmulatorWhere at = EmulatorWhere::current()) {
  return __ballot_sync(mask, predicate, at) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EmulatorWhere at = EmulatorWhere::current()) {
  const auto all = emulator::exchange(mask, value, "__match_any_sync", at);
  unsigned same = 0;
  for (int l = 0; l < emulator::kWarp; ++l) same |= unsigned(all[l] == value) << l;
  return same & mask;
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all_same,
                          EmulatorWhere at = EmulatorWhere::current()) {
  const bool same = __match_any_sync(mask, value, at) == mask;
  *all_same = same;
  return same ? mask : 0;
}

#define RFK_REDUCE(name, T, expression)                                            \
  inline T name(unsigned mask, T a, EmulatorWhere at = EmulatorWhere::current()) { \
    const auto all = emulator::exchange(mask, a, #name, at);                       \
    for (int l = 0; l < emulator::kWarp; ++l) {                                    \
      const T b = all[l];                                                          \
      if ((mask >> l & 1) && l != emulator::lane()) a = (expression);              \
    }                                                                              \
    return a;                                                                      \
  }
RFK_REDUCE(__reduce_add_sync, unsigned, a + b)
RFK_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
RFK_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
RFK_REDUCE(__reduce_min_sync, int, a < b ? a : b)
RFK_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
RFK_REDUCE(__reduce_max_sync, int, a > b ? a : b)
RFK_REDUCE(__reduce_and_sync, unsigned, a& b)
RFK_REDUCE(__reduce_or_sync, unsigned, a | b)
RFK_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef RFK_REDUCE

// --- atomics: indivisible here, since a thread runs until it meets others ---

#define RFK_ATOMIC(name, expression)                                                                   \
  template <typename T, typename V>                                                                    \
  __attribute__((noinline, no_sanitize_thread)) T name(T* address, V operand) {                        \
    emulator::check_access(address, sizeof(T), emulator::Access::atomic, __builtin_return_address(0)); \
    const T old = *address, v = T(operand);                                                            \
    *address = T(expression);                                                                          \
    return old;                                                                                        \
  }
RFK_ATOMIC(atomicAdd, old + v)
RFK_ATOMIC(atomicSub, old - v)
RFK_ATOMIC(atomicMin, old < v ? old : v)
RFK_ATOMIC(atomicMax, old > v ? old : v)
RFK_ATOMIC(atomicAnd, old& v)
RFK_ATOMIC(atomicOr, old | v)
RFK_ATOMIC(atomicXor, old ^ v)
RFK_ATOMIC(atomicExch, v)
RFK_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
RFK_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
#undef RFK_ATOMIC
template <typename T>
__attribute__((noinline, no_sanitize_thread)) T atomicCAS(T* address, T compare, T value) {
  emulator::check_access(address, sizeof(T), emulator::Access::atomic, __builtin_return_address(0));
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

// --- loads and stores with a hint ---

#define RFK_LOAD(name) \
  template <typename T> T name(const T* p) { return *p; }
#define RFK_STORE(name) \
  template <typename T> void name(T* p, T value) { *p = value; }
RFK_LOAD(__ldg)
RFK_LOAD(__ldcg)
RFK_LOAD(__ldca)
RFK_LOAD(__ldcs)
RFK_STORE(__stcg)
RFK_STORE(__stcs)
RFK_STORE(__stwb)
RFK_STORE(__stwt)
#undef RFK_LOAD
#undef RFK_STORE

// --- integers and bits ---

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }

// --- floating point, rounded to nearest even; the fast forms are as exact as the host's ---

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
