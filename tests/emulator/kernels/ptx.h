#pragma once

#include <string>

#include "core/tensor.h"

// Kernels that do one thing each with the functions of core/ptx.cuh, for tests/emulator/test_ptx.py:
// ptx_mma_fragments, ptx_mma_product, ptx_ldmatrix, ptx_stmatrix, ptx_cp_async, ptx_red_add, ptx_exp2,
// ptx_byte_permute, ptx_fma_pair, ptx_round_pair, ptx_lop3. A 32-bit register of a lane is an i64 element.
// `format` is f16, bf16, s8, u8s8 (a is unsigned) or e4m3.

namespace rfk::test {

// d = a b + c for fragments as the lanes hold them; one warp for every product.
// d, c: f32[n, 32, 4], or i64 for s8 and u8s8; a: i64[n, 32, 4]; b: i64[n, 32, 2].
void ptx_mma_fragments(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                       const TensorView& c, const std::string& format);

// d = a b^T by cp.async, ldmatrix and mma. d: f32[16, 8], or i64 for s8 and u8s8; a: 16 rows and b: 8 rows of
// 32 bytes.
void ptx_mma_product(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                     const std::string& format);

// r[lane, i] = what ldmatrix_x<matrices>[_trans] gives a lane that brings row `order[lane]` of `memory`.
// r: i64[32, matrices], matrices 1, 2 or 4; memory: 32 rows of 16 bytes; order: i64[32].
void ptx_ldmatrix(Stream stream, const TensorView& r, const TensorView& memory, const TensorView& order,
                  bool trans);

// memory: 32 rows of 16 bytes, written by stmatrix_x4 from r: i64[32, 4] with row `order[lane]` of each lane.
void ptx_stmatrix(Stream stream, const TensorView& memory, const TensorView& r, const TensorView& order);

// out = in for the first `valid` pieces of `bytes` bytes, zero after them, by cp.async in two groups.
// out, in: 64 pieces.
void ptx_cp_async(Stream stream, const TensorView& out, const TensorView& in, int64_t bytes, int64_t valid);

// sum[i % n] += x[i] for i < m, atomically. sum: f32[n], x: f32[m]; or f16, bf16 in pairs.
void ptx_red_add(Stream stream, const TensorView& sum, const TensorView& x);

// y = exp2_approx(x). y, x: f32[n].
void ptx_exp2(Stream stream, const TensorView& y, const TensorView& x);

// d = byte_permute(a, b, selector). All: i64[n].
void ptx_byte_permute(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                      const TensorView& selector);

// d = fma_f16x2(a, b, c) or fma_bf16x2(a, b, c). All: i64[n].
void ptx_fma_pair(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                  const TensorView& c, bool is_bf16);

// d[i] = round_to_f16x2, bf16x2 or e4m3x2 of x[2 i] and x[2 i + 1], by `format`. d: i64[n], x: f32[2 n].
void ptx_round_pair(Stream stream, const TensorView& d, const TensorView& x, const std::string& format);

// d[table] = lop3<table>(a, b, c) for every table. d: i64[256, n]; a, b, c: i64[n].
void ptx_lop3(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
              const TensorView& c);

}  // namespace rfk::test
