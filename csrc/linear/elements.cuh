#pragma once

#include "core/quantize.h"
#include "linear/decode.cuh"
#include "linear/epilogue.cuh"

// Operands one element at a time, of every storage, as float or double.

namespace rfk {

template <typename A> __device__ A x_at(const LinearArgs& args, int row, int k) {
  const int64_t at = row * args.x.stride + k;
  if (args.x_storage == Storage::int8) return A(static_cast<const int8_t*>(args.x.data)[at]);
  if (args.x_storage == Storage::e4m3) return A(decode_e4m3(static_cast<const uint8_t*>(args.x.data)[at]));
  return number_at<A>(args.x, at);
}

inline __device__ float gguf_at(const LinearArgs& args, int row, int k) {
  const uint8_t* const blocks = static_cast<const uint8_t*>(args.weight.data) + row * args.weight.stride;
  const Sixteen v = sixteen_of(args.gguf, blocks, k / 16);
  const uint32_t first = k & 4 ? v.codes[1] : v.codes[0], second = k & 4 ? v.codes[3] : v.codes[2];
  return std::fma(v.scale, float(int8_t((k & 8 ? second : first) >> 8 * (k % 4))), v.offset);
}

// The weight as it enters the sum: with its scale where that is not the scale of a column.
template <typename A> __device__ A weight_at(const LinearArgs& args, int row, int k) {
  const Table& w = args.weight;
  if (args.storage == Storage::floating) return number_at<A>(w, row * w.stride + k);
  if (args.storage == Storage::int8) return A(static_cast<const int8_t*>(w.data)[row * w.stride + k]);
  if (args.storage == Storage::e4m3)
    return A(decode_e4m3(static_cast<const uint8_t*>(w.data)[row * w.stride + k]));
  if (args.storage == Storage::gguf) return gguf_at(args, row, k);
  const int code = static_cast<const uint8_t*>(w.data)[row * w.stride + k / 2] >> 4 * (k % 2) & 15;
  const int64_t at = int64_t(row) * args.groups + k / args.group;
  const bool integer = args.weight_zero.data && args.weight_zero.dtype == DType::u8;
  const A q = A(code) - (integer ? number_at<A>(args.weight_zero, at) : A(8));
  if (args.column_scale) return q;
  const A scaled = q * number_at<A>(args.weight_scale, args.scale_per_row ? at : 0);
  return args.weight_zero.data && !integer ? scaled + number_at<A>(args.weight_zero, at) : scaled;
}

}  // namespace rfk
