#include "core/rows.h"

#include <algorithm>

#include "core/check.h"

namespace rfk {
namespace {

constexpr int kMaxArgs = 12;

// The leading `ndim` axes of x, and for each tensor that is read along them its strides.
struct Walk {
  int axes = 0, args = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims][kMaxArgs] = {};

  // The stride of a tensor along axis d of x: 0 where it does not vary.
  static int64_t stride_along(const RowArg& arg, int d) {
    return d < arg.view.ndim - arg.trailing && arg.view.shape[d] != 1 ? arg.view.stride[d] : 0;
  }

  // Adds axis d; it becomes one with the axis before it where every tensor walks through both with one
  // stride.
  void add(const TensorView& x, int d, std::span<RowArg> list) {
    if (x.shape[d] == 1) return;
    int64_t along[kMaxArgs] = {};
    for (int a = 0; a < args; ++a) along[a] = stride_along(list[a], d);
    bool merges = axes > 0;
    for (int a = 0; merges && a < args; ++a) merges = stride[axes - 1][a] == along[a] * x.shape[d];
    const int64_t before = merges ? size[--axes] : 1;
    size[axes] = before * x.shape[d];
    std::copy(along, along + args, stride[axes++]);
  }

  bool constant(int axis) const {
    return std::all_of(stride[axis], stride[axis] + args, [](int64_t s) { return s == 0; });
  }

  void finish(RowPlan& plan, std::span<RowArg> list) const {
    plan.axes = axes;
    for (int i = 0; i < axes; ++i) {
      plan.rows *= plan.size[i] = size[i];
      for (int a = 0; a < args; ++a) list[a].stride[i] = stride[i][a];
    }
  }
};

// The row axes of `arg` are leading axes of x, of which it has `ndim`, each as long or 1.
bool fits(const RowArg& arg, const TensorView& x, int ndim) {
  const int own = arg.view.ndim - arg.trailing;
  bool fits = 0 <= own && own <= ndim && arg.view.device == x.device;
  for (int d = 0; fits && d < own; ++d) fits = arg.view.shape[d] == x.shape[d] || arg.view.shape[d] == 1;
  return fits;
}

}  // namespace

RowPlan plan_rows(const char* op, const TensorView& x, std::span<RowArg> args) {
  check(args.size() <= kMaxArgs, op, ": expected at most ", kMaxArgs, " row scalars, got ", args.size());
  const DType dtype = acc_of(x.dtype);
  for (const RowArg& arg : args)
    check(arg.view.dtype == dtype && fits(arg, x, x.ndim), op, ": ", arg.name, " must be ", name_of(dtype),
          " on the device of x, its axes the leading axes of x ", x, ", each as long or 1; got ", arg.view);

  Walk walk{.args = int(args.size())};
  for (int d = 0; d < x.ndim; ++d) walk.add(x, d, args);
  RowPlan plan;
  if (walk.axes > 0 && walk.constant(walk.axes - 1)) plan.cols = walk.size[--walk.axes];
  check(walk.axes <= kRowAxes, op, ": expected scalars that vary along at most ", kRowAxes,
        " separate axes of x ", x, ", got ", walk.axes);
  walk.finish(plan, args);
  return plan;
}

RowPlan plan_vectors(const char* op, const TensorView& x, std::span<RowArg> args) {
  check(args.size() <= kMaxArgs, op, ": expected at most ", kMaxArgs, " tensors, got ", args.size());
  for (const RowArg& arg : args) {
    const TensorView& t = arg.view;
    check(fits(arg, x, x.ndim - 1), op, ": ", arg.name, " must lie on the device of x, its axes",
          arg.trailing ? " before the last" : "", " the leading axes of x ", x, ", each as long or 1; got ",
          t);
    check(!arg.trailing || t.shape[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1, op, ": ", arg.name,
          " must have no gaps along its last axis, got ", t, " with stride ", t.stride[t.ndim - 1]);
  }
  Walk walk{.args = int(args.size())};
  for (int d = 0; d < x.ndim - 1; ++d) walk.add(x, d, args);
  check(walk.axes <= kRowAxes, op, ": expected leading axes of x that merge into at most ", kRowAxes,
        ", got ", x, " with ", walk.axes);
  RowPlan plan;
  plan.cols = x.shape[x.ndim - 1];
  walk.finish(plan, args);
  return plan;
}

}  // namespace rfk
