#pragma once

#include "core/dispatch.h"
#include "moe/moe.h"

namespace rfk {

template <typename T> struct Combine {
  using A = acc_t<T>;
  T* out;
  const T *y, *residual;  // residual may be null
  const A* weights;
  const int32_t *slots, *end;  // end: offsets[experts], behind which slots add nothing
  int64_t y_stride, res_stride;
  int64_t rows, width, y_rows;
  int top_k;

  // The row of y that is the row's choice j, or null.
  RFK_HD const T* chosen(int64_t row, int j) const {
    const int64_t slot = slots[row * top_k + j], limit = *end < y_rows ? *end : y_rows;
    return 0 <= slot && slot < limit ? y + slot * y_stride : nullptr;
  }
};

// Calls f(Combine) with the call of checked tensors.
template <typename F>
void with_combine(const TensorView& out, const TensorView& y, const TensorView& weights,
                  const TensorView& slots, const TensorView& offsets, const Optional& residual, F&& f) {
  dispatch_float("moe_combine", y.dtype, [&]<typename T>() {
    f(Combine<T>{out.ptr<T>(), y.ptr<T>(), residual ? residual->ptr<T>() : nullptr, weights.ptr<acc_t<T>>(),
                 slots.ptr<int32_t>(), offsets.ptr<int32_t>() + offsets.shape[0] - 1, y.stride[0],
                 residual ? residual->stride[0] : 0, out.shape[0], out.shape[1], y.shape[0],
                 int(slots.shape[1])});
  });
}

}  // namespace rfk
