#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/quantize.h"

// The one home of inline PTX, for sm_80 and later. Pointers are generic; `shared` and `row` point into
// shared memory, the others into global memory. tests/emulator/core/ptx.cuh has the same functions for
// the CPU. What "lane l holds" of a matrix: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "m16n8k32".

namespace rfk {
namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

}  // namespace ptx

// mov.u32 %laneid
__device__ __forceinline__ int lane_id() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// ldmatrix.sync.aligned.m8n8.x1 .x2 .x4: the whole warp reads one, two or four 8x8 matrices of 16-bit
// elements. Lane 8 i + j brings the address of row j of matrix i: 16 bytes, 16-byte aligned. Afterwards
// r[i] of lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i, or of column l / 4
// with _trans.
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(ptx::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(ptx::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ptx::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(ptx::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(ptx::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(ptx::shared_address(row))
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x4.shared.b16, the inverse of ldmatrix_x4; four stores per lane before sm_90
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(ptx::shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#else
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint64_t to = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(row), 8 * i + lane / 4);
    reinterpret_cast<uint32_t*>(to)[lane % 4] = r[i];
  }
#endif
}

// cp.async.cg (16 bytes: past L1), cp.async.ca (4 or 8): copies from global to shared memory, both
// addresses aligned to their size. The copying thread sees the bytes after the cp_async_wait that covers
// them, other threads after a barrier that follows it.
template <int Bytes> __device__ __forceinline__ void cp_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const uint32_t to = ptx::shared_address(shared);
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
}

// cp.async with a source size: reads nothing and writes zeros where not `valid`
template <int Bytes>
__device__ __forceinline__ void cp_async_zfill(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const uint32_t to = ptx::shared_address(shared);
  const size_t from = __cvta_generic_to_global(global);
  const int read = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Bytes), "r"(read)
                 : "memory");
}

// cp.async.commit_group: makes a group of this thread's copies since the last one
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// cp.async.wait_group: waits until at most the N newest groups of this thread are under way
template <int N> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// v, of which the compiler knows nothing: what is made of it is made where it is used, and not kept in
// registers through a loop.
template <typename T> __device__ __forceinline__ T opaque(T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(v));
  else
    asm volatile("" : "+r"(v));
  return v;
}

// prmt.b32: nibble i of `selector` names byte i of the result among a (0..3) and b (4..7); with 8 added,
// the sign of that byte, eight times
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// lop3.b32: every bit is the bit 4 a + 2 b + c of Table; Table = f(0xf0, 0xcc, 0xaa) for f(a, b, c)
template <uint8_t Table> __device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return d;
}

// fma.rn.f16x2: a b + c of two pairs, each rounded once, subnormals kept
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// fma.rn.bf16x2
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// mma.sync.aligned: the whole warp computes d = a b + c, [16, 8] = [16, K] [K, 8] + [16, 8]. A register
// of a and b holds neighbours along K, the first in its low bits. d may be c.

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                        const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
}

// mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32: sums wrap
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                       const int32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}

// mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32: a is unsigned, b signed
__device__ __forceinline__ void mma_u8s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const int32_t (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}

namespace ptx {

// Four e4m3 as two registers of f16: the bits of a magnitude are those of an f16 that is 2^-8 of it, and the
// code of NaN is the one that carries when 1 is added.
__device__ __forceinline__ void e4m3_to_f16(uint32_t codes, uint32_t& low, uint32_t& high) {
  const uint32_t magnitude = codes & 0x7f7f7f7f, carries = magnitude + 0x01010101;
  const uint32_t low_sign = byte_permute(codes, 0, 0x1404), high_sign = byte_permute(codes, 0, 0x3424);
  low = byte_permute(magnitude, 0, 0x1404) >> 1 | (low_sign & 0x80008000);
  high = byte_permute(magnitude, 0, 0x3424) >> 1 | (high_sign & 0x80008000);
  low = fma_f16x2(low, 0x5c005c00, byte_permute(carries, 0, 0x9988));
  high = fma_f16x2(high, 0x5c005c00, byte_permute(carries, 0, 0xbbaa));
}

}  // namespace ptx

// mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32. sm_80, 86 and 87 lack it: there the codes become f16,
// whose products are exact in float too.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const float (&c)[4]) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  // K of the two products: registers 0 and 1 of a with 0 of b, then 2 and 3 with 1
  uint32_t first[4], second[4], other[2];
  ptx::e4m3_to_f16(a[0], first[0], first[2]);
  ptx::e4m3_to_f16(a[1], first[1], first[3]);
  ptx::e4m3_to_f16(b[0], other[0], other[1]);
  mma_f16(d, first, other, c);
  ptx::e4m3_to_f16(a[2], second[0], second[2]);
  ptx::e4m3_to_f16(a[3], second[1], second[3]);
  ptx::e4m3_to_f16(b[1], other[0], other[1]);
  mma_f16(d, second, other, d);
#endif
}

// Whether the code being compiled is for a device whose mma.sync multiplies e4m3 faster than f16: sm_89 and
// sm_120. `multiplies_e4m3` of core/launch.cuh says the same of a device.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
inline constexpr bool kMultipliesE4m3 = true;
#else
inline constexpr bool kMultipliesE4m3 = false;
#endif

// Keeps nvcc from having more mma under way than there are registers: a __syncwarp, but not on sm_120, where
// one makes it spill (nvcc 13.0).
__device__ __forceinline__ void fence_products() {
#if __CUDA_ARCH__ < 1200
  __syncwarp();
#endif
}

// cvt.rn.f16x2.f32, cvt.rn.bf16x2.f32: two floats rounded to nearest even, `low` in the low bits
__device__ __forceinline__ uint32_t round_to_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t round_to_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// cvt.rn.satfinite.e4m3x2.f32 of finite numbers and NaN: beyond 448 is 448; the high bits are 0. encode_e4m3
// before sm_89.
__device__ __forceinline__ uint32_t round_to_e4m3x2(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
#else
  return encode_e4m3(low) | uint32_t(encode_e4m3(high)) << 8;
#endif
}

// red.relaxed.gpu.global.add.f32: *p += v, atomic; subnormals become zero
__device__ __forceinline__ void red_add(float* p, float v) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "f"(v)
               : "memory");
}

// red.relaxed.gpu.global.add.noftz.f16x2: two sums, each atomic
__device__ __forceinline__ void red_add_f16x2(uint32_t* p, uint32_t v) {
  asm volatile("red.relaxed.gpu.global.add.noftz.f16x2 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
}

// red.relaxed.gpu.global.add.noftz.bf16x2: two sums, each atomic; CUDA's compare-and-swap before sm_90
__device__ __forceinline__ void red_add_bf16x2(uint32_t* p, uint32_t v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(v)
               : "memory");
#else
  atomicAdd(reinterpret_cast<__nv_bfloat162*>(p), reinterpret_cast<const __nv_bfloat162&>(v));
#endif
}

// ex2.approx.ftz.f32: 2^x to about 2 ulp, subnormals become zero
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// bar.sync: `threads` threads (whole warps) meet at barrier `id`, 1 .. 15; __syncthreads uses barrier 0
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace rfk
