#pragma once

#include "core/dispatch.h"
#include "core/map_rows.h"

namespace rfk {

// out = a x + b v: one step of Euler's method, of DDIM, and of every affine prediction type.
template <typename A> struct AffineStep {
  static constexpr int kInputs = 2;  // x, v
  RowScalar<A> a, b;

  struct Row {
    A a, b;
    RFK_HD A operator()(const A (&v)[2]) const { return a * v[0] + b * v[1]; }
  };
  RFK_HD Row row(RowIndex r) const { return {a.at(r), b.at(r)}; }
};

// Runs the step on checked tensors; `map_rows` is the back end.
template <typename MapRows>
void run_affine_step(const MapRows& map_rows, const TensorView& out, const TensorView& x, const TensorView& v,
                     const TensorView& a, const TensorView& b) {
  RowArg rows[] = {{"a", a}, {"b", b}};
  const RowPlan plan = plan_rows("affine_step", x, rows);
  dispatch_state("affine_step", x, v, [&]<typename T, typename V>() {
    using A = acc_t<T>;
    const Inputs<T, V, 2> in{x.ptr<T>(), {v.ptr<V>()}};
    map_rows(out.ptr<T>(), in, plan, AffineStep<A>{rows[0].scalar<A>(), rows[1].scalar<A>()});
  });
}

}  // namespace rfk
