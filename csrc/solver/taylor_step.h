#pragma once

#include "core/dispatch.h"
#include "core/map_rows.h"

namespace rfk {

// One step along a trajectory whose first K time derivatives are known:
//
//   x(t + dt) = x + dt d_1 + dt^2/2! d_2 + ... + dt^K/K! d_K
//
// by Horner's rule from the highest derivative down, so that no power of dt and no
// factorial is ever formed.
template <int K, typename A> struct TaylorStep {
  static constexpr int kInputs = 1 + K;  // x, d_1, ..., d_K
  RowScalar<A> dt;

  struct Row {
    A dt;
    RFK_HD A operator()(const A (&v)[kInputs]) const {
      A step = 0;
      for (int k = K; k >= 1; --k) step = (v[k] + step) * (dt / k);
      return v[0] + step;
    }
  };
  RFK_HD Row row(RowIndex r) const { return {dt.at(r)}; }
};

inline constexpr int kMaxTaylorOrder = 4;

// Runs the step on checked tensors; `map_rows` is the back end.
template <typename MapRows>
void run_taylor_step(const MapRows& map_rows, const TensorView& out, const TensorView& x,
                     const TensorView& derivatives, const TensorView& dt) {
  RowArg rows[] = {{"dt", dt}};
  const RowPlan plan = plan_rows("taylor_step", x, rows);
  dispatch_state("taylor_step", x, derivatives, [&]<typename T, typename V>() {
    dispatch_int<1, kMaxTaylorOrder>(derivatives.shape[0], [&]<int K>() {
      Inputs<T, V, 1 + K> in{x.ptr<T>()};
      for (int k = 1; k <= K; ++k) in.rest[k - 1] = derivatives.slice(k - 1).template ptr<V>();
      map_rows(out.ptr<T>(), in, plan, TaylorStep<K, acc_t<T>>{rows[0].scalar<acc_t<T>>()});
    });
  });
}

}  // namespace rfk
