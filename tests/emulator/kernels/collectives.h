#pragma once

#include "core/tensor.h"

namespace rfk::test {

// out[i], in[i] of thread i of one block of 64: the collective number `op` over a lane's value, with `number`
// as its lane, delta, bits or mask of the value. The list of ops is in collectives.cu.
void collective(Stream stream, const TensorView& out, const TensorView& in, int64_t op, int64_t number);

// out[b] = sum over the threads of block b of i^2 (int64), by atomics on shared, then on global memory.
void atomic_sum(Stream stream, const TensorView& out, int64_t threads);

// out[i] = 2 in[i], a float4 a thread, whose members are taken apart.
void double_vectors(Stream stream, const TensorView& out, const TensorView& in);

// out[i] = the index that thread i of a grid with blocks of `x` times `y` threads computes for itself.
void index(Stream stream, const TensorView& out, int64_t x, int64_t y);

// out[t] = the largest of in[t], in[32 + t], in[64 + t], in[96 + t]: three warps hand theirs to the first at
// the named barrier 1.
void produce_and_consume(Stream stream, const TensorView& out, const TensorView& in);

}  // namespace rfk::test
