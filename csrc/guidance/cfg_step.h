#pragma once

#include "core/dispatch.h"
#include "core/map_rows.h"

namespace rfk {

// out = a x + b (u + w (c - u)): classifier-free guidance (Ho & Salimans, 2022), then the step.
template <typename A> struct CfgStep {
  static constexpr int kInputs = 3;  // x, u (unconditional), c (conditional)
  RowScalar<A> w, a, b;

  struct Row {
    A w, a, b;
    RFK_HD A operator()(const A (&v)[3]) const { return a * v[0] + b * (v[1] + w * (v[2] - v[1])); }
  };
  RFK_HD Row row(RowIndex r) const { return {w.at(r), a.at(r), b.at(r)}; }
};

// Runs the step on checked tensors; `map_rows` is the back end.
template <typename MapRows>
void run_cfg_step(const MapRows& map_rows, const TensorView& out, const TensorView& x,
                  const TensorView& uncond, const TensorView& cond, const TensorView& guidance,
                  const TensorView& a, const TensorView& b) {
  RowArg rows[] = {{"guidance", guidance}, {"a", a}, {"b", b}};
  const RowPlan plan = plan_rows("cfg_step", x, rows);
  dispatch_state("cfg_step", x, uncond, [&]<typename T, typename V>() {
    using A = acc_t<T>;
    const Inputs<T, V, 3> in{x.ptr<T>(), {uncond.ptr<V>(), cond.ptr<V>()}};
    map_rows(out.ptr<T>(), in, plan,
             CfgStep<A>{rows[0].scalar<A>(), rows[1].scalar<A>(), rows[2].scalar<A>()});
  });
}

}  // namespace rfk
