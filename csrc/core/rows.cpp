#include "core/rows.h"

#include <algorithm>

#include "core/check.h"

namespace rfk {
namespace {

constexpr int kMaxArgs = 4;

struct Axis {
  int64_t size;
  int64_t stride[kMaxArgs];
};

void check_arg(const char* op, const TensorView& x, const RowArg& arg) {
  const TensorView& t = arg.view;
  const DType dtype = acc_of(x.dtype);
  bool fits = t.dtype == dtype && t.device == x.device && t.ndim <= x.ndim;
  for (int d = 0; fits && d < t.ndim; ++d) fits = t.shape[d] == x.shape[d] || t.shape[d] == 1;
  check(fits, op, ": ", arg.name, " must be ", name_of(dtype),
        " on the device of x, its axes the leading axes of x ", x, ", each as long or 1; got ", t);
}

// The stride of `t` along axis d of x: 0 where it does not vary.
int64_t stride_along(const TensorView& t, int d) { return d < t.ndim && t.shape[d] != 1 ? t.stride[d] : 0; }

}  // namespace

RowPlan plan_rows(const char* op, const TensorView& x, std::span<RowArg> args) {
  check(args.size() <= kMaxArgs, op, ": expected at most ", kMaxArgs, " row scalars, got ", args.size());
  for (const RowArg& arg : args) check_arg(op, x, arg);

  // Neighbouring axes that every scalar walks through with one stride become one axis.
  Axis axes[kMaxDims];
  int count = 0;
  for (int d = 0; d < x.ndim; ++d) {
    if (x.shape[d] == 1) continue;
    Axis axis{x.shape[d], {}};
    for (size_t a = 0; a < args.size(); ++a) axis.stride[a] = stride_along(args[a].view, d);
    bool merges = count > 0;
    for (size_t a = 0; merges && a < args.size(); ++a)
      merges = axes[count - 1].stride[a] == axis.stride[a] * axis.size;
    if (merges) axis.size *= axes[--count].size;
    axes[count++] = axis;
  }

  RowPlan plan;
  const auto constant = [&](const Axis& axis) {
    return std::all_of(axis.stride, axis.stride + args.size(), [](int64_t s) { return s == 0; });
  };
  if (count > 0 && constant(axes[count - 1])) plan.cols = axes[--count].size;
  check(count <= kRowAxes, op, ": expected scalars that vary along at most ", kRowAxes,
        " separate axes of x ", x, ", got ", count);
  plan.axes = count;
  for (int i = 0; i < count; ++i) {
    plan.rows *= plan.size[i] = axes[i].size;
    for (size_t a = 0; a < args.size(); ++a) args[a].stride[i] = axes[i].stride[a];
  }
  return plan;
}

}  // namespace rfk
