#pragma once

#include "core/tensor.h"

// Kernels with one fault each, which the emulator must find; `fault` = 0 is the sound form of each.

namespace rfk::test {

// out[block] = sum of the block's 256 elements of `in`, by a tree in shared memory.
// fault 1: one barrier is missing. 2: half of the block returns before the first one. 3: the halves of the
// block wait at different ones. 4: one element of the tile is never written.
void block_sum(Stream stream, const TensorView& out, const TensorView& in, int64_t fault);

// out[i] = in[i] for i < n. fault 1: one thread more writes. 2: one element before the first is read.
void copy(Stream stream, const TensorView& out, const TensorView& in, int64_t fault);

// out[i] = in[i ^ 32], through shared memory, in blocks of 64. fault 1: no barrier between the warps' writes
// and reads. 2: the tile is used again without a barrier.
void swap_warps(Stream stream, const TensorView& out, const TensorView& in, int64_t fault);

// out[i] = in[i] by cp.async in blocks of 64. fault 1: read before the wait. 2: waits for the older of two
// groups and reads the younger. 3: another warp reads without a barrier.
void copy_through_async(Stream stream, const TensorView& out, const TensorView& in, int64_t fault);

// out[0] = dynamic shared memory of `bytes` used. fault 1: one float past it is written.
void use_shared(Stream stream, const TensorView& out, int64_t bytes, int64_t fault);

// out = 0 with blocks of `threads`. fault 1: 48 KB of static shared memory and one float more.
void use_block(Stream stream, const TensorView& out, int64_t threads, int64_t fault);

}  // namespace rfk::test
