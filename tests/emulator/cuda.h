#pragma once

// Included before every .cu file that is compiled as C++: the keywords of CUDA, its vector types and what a
// kernel reads of its place in the grid. intrinsics.h has the functions.

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block runs at a time; memory.cpp poisons it for each
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::emulator::self.thread_index)
#define blockIdx (::emulator::self.block_index)
#define blockDim (::emulator::self.block_dim)
#define gridDim (::emulator::self.grid_dim)
inline constexpr int warpSize = emulator::kWarp;

using cudaStream_t = void*;

struct dim3 : emulator::Dim {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Dim{x, y, z} {}
};

#define RFK_VECTOR(name, T)                                                          \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
RFK_VECTOR(char, signed char)
RFK_VECTOR(uchar, unsigned char)
RFK_VECTOR(short, short)
RFK_VECTOR(ushort, unsigned short)
RFK_VECTOR(int, int)
RFK_VECTOR(uint, unsigned)
RFK_VECTOR(float, float)
RFK_VECTOR(double, double)
RFK_VECTOR(longlong, long long)
RFK_VECTOR(ulonglong, unsigned long long)
#undef RFK_VECTOR

#include "intrinsics.h"
