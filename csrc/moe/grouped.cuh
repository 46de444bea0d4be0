#pragma once

#include <algorithm>

#include "core/launch.cuh"
#include "moe/grouped_linear.h"

// What the CUDA kernels of grouped_linear share. A block makes a tile of the result: rows of one expert,
// found from the offsets, and a panel of columns of each of two weights: gate and up, or neighbours of the
// one.

namespace rfk {

struct GroupedArgs {
  const void *weights[2][kMaxExperts], *bias[2][kMaxExperts];  // [1]: of up
  const void* x;
  void* out;
  const int32_t *offsets, *index;
  int64_t x_stride, out_stride;
  int x_rows, slots, n, k, experts;
  bool gated, has_bias, x_pieces, weight_pieces, out_pieces;  // pieces: 16 bytes at a time
};

inline GroupedArgs grouped_args(const GroupedCall& c) {
  constexpr int64_t kMost = 0x7fffffff;
  check(c.slots() <= kMost && c.x.shape[0] <= kMost && c.n() <= kMost && c.k() <= kMost / 8,
        "grouped_linear: axes must be below 2^31 on CUDA, got x ", c.x, " and out ", c.out);
  GroupedArgs a{};
  const int size = size_of(c.x.dtype);
  const auto whole = [&](const void* data, int64_t stride) {
    return (uintptr_t(data) | uint64_t(stride) * size) % 16 == 0;
  };
  a.weight_pieces = c.k() * size % 16 == 0;
  for (int e = 0; e < c.experts(); ++e) {
    a.weights[0][e] = c.weights[e].data, a.weights[1][e] = c.gated() ? c.up[e].data : c.weights[e].data;
    a.bias[0][e] = c.bias.empty() ? nullptr : c.bias[e].data;
    a.bias[1][e] = !c.gated() ? a.bias[0][e] : c.up_bias.empty() ? nullptr : c.up_bias[e].data;
    a.weight_pieces &= whole(a.weights[0][e], c.k()) && whole(a.weights[1][e], c.k());
  }
  a.x = c.x.data, a.out = c.out.data, a.offsets = c.offsets.ptr<int32_t>();
  a.index = c.index ? c.index->ptr<int32_t>() : nullptr;
  a.x_stride = c.x.stride[0], a.out_stride = c.out.stride[0];
  a.x_pieces = c.k() * size % 16 == 0 && whole(a.x, a.x_stride);
  a.out_pieces = c.n() * size % 16 == 0 && whole(a.out, a.out_stride);
  a.x_rows = int(c.x.shape[0]), a.slots = int(c.slots()), a.n = int(c.n()), a.k = int(c.k());
  a.experts = c.experts(), a.gated = c.gated(), a.has_bias = !c.bias.empty() || !c.up_bias.empty();
  return a;
}

// The blocks of a launch: tiles of rows, at most one of each expert and of what is behind not full.
inline dim3 grouped_grid(const GroupedArgs& a, int rows, int columns) {
  const int width = a.gated ? columns : 2 * columns;
  return dim3(unsigned(a.slots / rows + a.experts + 1), unsigned((int64_t(a.n) + width - 1) / width));
}

// The rows of a block, [first, end) of the slots; expert = args.experts: those behind the last one.
struct GroupedRows {
  int expert, first = 0, end = 0;

  __device__ GroupedRows(const GroupedArgs& args, int tile, int rows) {
    int begin = 0, seen = 0;
#pragma unroll 1
    for (expert = 0; expert <= args.experts; ++expert) {
      const int given = expert < args.experts ? args.offsets[expert + 1] : args.slots;
      const int stop = given < begin ? begin : given > args.slots ? args.slots : given;
      const int tiles = (stop - begin + rows - 1) / rows;
      if (tile < seen + tiles) {
        first = begin + (tile - seen) * rows;
        end = first + rows < stop ? first + rows : stop;
        return;
      }
      seen += tiles, begin = stop;
    }
  }

  __device__ bool none() const { return first == end; }

  // The row of x of a slot; -1: there is none.
  __device__ int row_of(const GroupedArgs& args, int slot) const {
    const int row = args.index ? args.index[slot] : slot;
    return row < args.x_rows && row >= 0 ? row : -1;
  }
};

// Columns of panel i of a block begin here.
__device__ __forceinline__ int grouped_column(const GroupedArgs& args, int i, int columns) {
  return int(blockIdx.y) * (args.gated ? columns : 2 * columns) + (args.gated ? 0 : i * columns);
}

void grouped_mma(Stream stream, DType dtype, const GroupedArgs& args);  // f16, bf16
void grouped_fma(Stream stream, DType dtype, const GroupedArgs& args);  // float, double

}  // namespace rfk
