#pragma once

#include <algorithm>

#include "core/check.h"
#include "linear/call.h"

// What the CUDA kernels of the room get of a call.

namespace rfk {

// One tensor of numbers of whatever dtype; `stride` between rows, in elements.
struct Table {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;

  Table() = default;
  explicit Table(const Optional& t) {
    if (!t) return;
    data = t->data;
    dtype = t->dtype;
    stride = t->ndim > 1 ? t->stride[0] : 0;
  }
  explicit Table(const TensorView& t) : Table(Optional(t)) {}

  // Rows of this tensor may be read in pieces of `elements`.
  bool aligned(int64_t elements) const {
    const int64_t bytes = elements * size_of(dtype), piece = bytes < 16 ? bytes : 16;
    return (reinterpret_cast<uintptr_t>(data) | uint64_t(stride) * size_of(dtype)) % piece == 0;
  }
};

struct LinearArgs {
  int m, n, k, rank = 0;
  int processors;                // of the device
  Table x, weight;               // a row of four-bit codes: k / 2 elements; of blocks: their bytes
  Storage storage, x_storage;    // of x: floating, int8 or e4m3
  Gguf gguf;                     // of blocks
  bool x_pieces, weight_pieces;  // 16 bytes at a time
  Table x_scale, weight_scale, weight_zero;
  int groups = 1, group;  // of weight_scale: inputs of a group
  bool column_scale;      // weight_scale is one number or one a column: the sum is multiplied by it
  bool scale_per_row;
  Table hidden, up;
  bool low_rank_bf16, low_rank_pieces;  // the type of the low-rank branch's products; 8 elements at a time
  Table out, bias, gate, residual, out_scale;
  bool pieces;  // 8 columns at a time of all tables of columns
  unsigned rows_per_gate = 1;
  Epilogue epilogue;
};

inline bool is_16_bit(DType t) { return t == DType::f16 || t == DType::bf16; }

inline bool low_rank_is_bf16(const LinearCall& call) {
  if (!call.up) return true;
  for (DType t : {call.up->dtype, call.x.dtype, call.out.dtype})
    if (is_16_bit(t)) return t == DType::bf16;
  return true;
}

inline LinearArgs linear_args(const LinearCall& call, int processors) {
  constexpr int64_t kMost = 0x7fffffff;
  check(call.m <= kMost && call.n <= kMost && call.k <= kMost / 2,
        "linear: axes must be below 2^31 on CUDA, got x ", call.x, ", weight ", call.weight);
  LinearArgs a{};
  a.processors = processors;
  a.m = int(call.m), a.n = int(call.n), a.k = int(call.k), a.rank = call.hidden ? int(call.rank) : 0;
  a.x = Table(call.x), a.weight = Table(call.weight);
  a.weight.stride = call.weight.shape[1];
  a.storage = call.storage, a.gguf = call.gguf;
  a.x_storage = call.x.dtype == DType::i8   ? Storage::int8
                : call.x.dtype == DType::u8 ? Storage::e4m3
                                            : Storage::floating;
  const auto whole = [](const Table& t, int64_t elements) {
    return t.aligned(16) && elements * size_of(t.dtype) % 16 == 0;
  };
  a.x_pieces = whole(a.x, a.k);
  a.weight_pieces = whole(a.weight, a.weight.stride);
  a.x_scale = Table(call.x_scale);
  a.weight_scale = Table(call.weight_scale), a.weight_zero = Table(call.weight_zero);
  a.groups = int(call.groups), a.group = std::max(int(call.group()), 1);
  const bool offset = call.weight_zero && call.weight_zero->dtype != DType::u8;
  a.column_scale = a.groups == 1 && !offset;
  a.scale_per_row = call.scale_per_row;
  a.hidden = Table(call.hidden), a.up = Table(call.up);
  a.low_rank_bf16 = low_rank_is_bf16(call);
  a.low_rank_pieces = a.rank % 8 == 0 && a.hidden.aligned(8) && a.up.aligned(8);
  a.out = Table(call.out), a.bias = Table(call.bias), a.gate = Table(call.gate);
  a.residual = Table(call.residual), a.out_scale = Table(call.out_scale);
  a.pieces = a.n % 8 == 0;
  for (const Table* t : {&a.out, &a.bias, &a.gate, &a.residual}) a.pieces &= t->aligned(8);
  a.rows_per_gate = unsigned(call.rows_per_gate());
  a.epilogue = call.epilogue;
  return a;
}

}  // namespace rfk
