#include "moe/moe_combine.h"

#include <algorithm>

#include "core/backend.h"

namespace rfk {
namespace {

constexpr const char* kOp = "moe_combine";

bool is_rows(const TensorView& t) { return t.ndim == 2 && (t.shape[1] <= 1 || t.stride[1] == 1); }

void check_combine(const TensorView& out, const TensorView& y, const TensorView& weights,
                   const TensorView& slots, const TensorView& offsets, const Optional& residual) {
  check(is_rows(y) && is_floating(y.dtype) && y.shape[1] >= 1, kOp,
        ": y must be floating [slots, width], adjacent along the last axis, got ", y);
  check(slots.ndim == 2 && slots.dtype == DType::i32 && slots.shape[1] >= 1 && slots.numel() == y.shape[0],
        kOp, ": slots must be i32[rows, top_k], one for each row of y ", y, ", got ", slots);
  check(weights.dtype == acc_of(y.dtype) && same_shape(weights, slots), kOp, ": weights must be ",
        name_of(acc_of(y.dtype)), " like slots ", slots, ", got ", weights);
  check(offsets.ndim == 1 && offsets.dtype == DType::i32 && offsets.shape[0] >= 1, kOp,
        ": offsets must be i32[experts + 1], got ", offsets);
  check(out.dtype == y.dtype && out.has_shape({slots.shape[0], y.shape[1]}), kOp, ": out must be ",
        name_of(y.dtype), "[", slots.shape[0], ", ", y.shape[1], "], got ", out);
  check(!residual || (is_rows(*residual) && same_type(*residual, out)), kOp,
        ": residual must be like the result ", out, ", adjacent along the last axis, got ", residual);
  check_dense(kOp, out, {&weights, &slots, &offsets});
  for (const TensorView* t : {&y, residual ? &*residual : &y})
    check(t->device == out.device, kOp, ": expected all tensors on one device, got ", out, " and ", *t);
  check_apart(kOp, out, y);
  if (residual) check_no_partial_overlap(kOp, out, *residual);
}

template <typename A, typename T> RFK_SIMD void add_piece(A* sums, const T* from, A weight, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += weight * load(from[i]);
}

template <typename A, typename T> RFK_SIMD void load_piece(A* sums, const T* from, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] = load(from[i]);
}

template <typename A, typename T> RFK_SIMD void store_piece(T* to, const A* sums, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = store<T>(sums[i]);
}

template <typename T> void combine_row(const Combine<T>& c, int64_t row) {
  using A = acc_t<T>;
  constexpr int64_t kPiece = 512;
  alignas(64) A sums[kPiece];
  for (int64_t at = 0; at < c.width; at += kPiece) {
    const int64_t count = std::min(kPiece, c.width - at);
    if (c.residual)
      load_piece(sums, c.residual + row * c.res_stride + at, count);
    else
      std::fill(sums, sums + count, A(0));
    for (int j = 0; j < c.top_k; ++j)
      if (const T* y = c.chosen(row, j)) add_piece(sums, y + at, c.weights[row * c.top_k + j], count);
    store_piece(c.out + row * c.width + at, sums, count);
  }
}

}  // namespace

void moe_combine(Stream stream, const TensorView& out, const TensorView& y, const TensorView& weights,
                 const TensorView& slots, const TensorView& offsets, const Optional& residual) {
  check_combine(out, y, weights, slots, offsets, residual);
  if (out.numel() == 0) return;
  if (out.device.type == DeviceType::cpu)
    return with_combine(out, y, weights, slots, offsets, residual, [](const auto& c) {
#pragma omp parallel for schedule(static) if (c.rows * c.width > 1 << 15)
      for (int64_t row = 0; row < c.rows; ++row) combine_row(c, row);
    });
  if constexpr (kWithCuda) return moe_combine_cuda(stream, out, y, weights, slots, offsets, residual);
  fail_without_cuda(kOp);
}

}  // namespace rfk
