#pragma once

#include <cstdint>
#include <span>

#include "core/hd.h"
#include "core/tensor.h"

// Row scalars: coefficients that are constant along the trailing axes of a tensor. A scalar of
// shape [] serves all of x, [B] each sample, [B, 1, F] each frame of [B, C, F, H, W], [B, L] each
// token of [B, L, C]: its axes are the leading axes of x, each as long as x's or 1.

namespace rfk {

inline constexpr int kRowAxes = 5;  // axes of x, after merging, along which scalars may vary

struct RowIndex {
  int64_t i[kRowAxes];
};

// x as [rows, cols], where all scalars of a call are constant along a row.
struct RowPlan {
  int64_t rows = 1, cols = 1;
  int axes = 0;  // how many of `size` are in use
  int64_t size[kRowAxes] = {};

  RFK_HD RowIndex index(int64_t row) const {
    RowIndex r{};
    for (int a = kRowAxes - 1; a > 0; --a) {
      if (a >= axes) continue;
      r.i[a] = row % size[a];
      row /= size[a];
    }
    r.i[0] = row;
    return r;
  }
};

// One scalar per row, read through strides.
template <typename A> struct RowScalar {
  const A* data;
  int64_t stride[kRowAxes];

  RFK_HD A at(RowIndex r) const {
    int64_t at = 0;
    for (int a = 0; a < kRowAxes; ++a) at += r.i[a] * stride[a];
    return data[at];
  }
};

// One vector per row, read or written through strides; null if absent.
template <typename T> struct RowVectors {
  T* data = nullptr;
  int64_t stride[kRowAxes] = {};

  RFK_HD T* at(RowIndex r) const {
    int64_t at = 0;
    for (int a = 0; a < kRowAxes; ++a) at += r.i[a] * stride[a];
    return data + at;
  }
  // Every row begins at a multiple of `bytes`.
  bool aligned(int64_t bytes) const {
    int64_t rest = int64_t(reinterpret_cast<uintptr_t>(data)) % bytes;
    for (int a = 0; a < kRowAxes; ++a) rest |= stride[a] * int64_t(sizeof(T)) % bytes;
    return rest == 0;
  }
};

struct RowArg {
  const char* name;
  TensorView view;
  int trailing = 0;               // axes of its own behind the row axes
  int64_t stride[kRowAxes] = {};  // filled in by plan_rows and plan_vectors

  template <typename A> RowScalar<A> scalar(int64_t offset = 0) const {
    RowScalar<A> s{view.ptr<A>() + offset, {}};
    for (int a = 0; a < kRowAxes; ++a) s.stride[a] = stride[a];
    return s;
  }
  template <typename T> RowVectors<T> vectors() const {
    RowVectors<T> v{view.ptr<T>(), {}};
    for (int a = 0; a < kRowAxes; ++a) v.stride[a] = stride[a];
    return v;
  }
};

// Checks the scalars of a call against x and finds the rows that they have in common.
RowPlan plan_rows(const char* op, const TensorView& x, std::span<RowArg> args);

// x [*lead, width] as rows along its last axis. The tensors of a call, x and the results among them, are read
// along `lead` through any strides: tensors with a last axis of their own (trailing 1, in which neighbours
// must be adjacent), and row scalars (trailing 0).
RowPlan plan_vectors(const char* op, const TensorView& x, std::span<RowArg> args);

}  // namespace rfk
