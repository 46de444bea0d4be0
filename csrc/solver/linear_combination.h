#pragma once

#include <vector>

#include "core/dispatch.h"
#include "core/map_rows.h"

namespace rfk {

// out = c_0 y_0 + c_1 y_1 + ... + c_{K-1} y_{K-1}, summed from left to right.
template <int K, typename A> struct LinearCombination {
  static constexpr int kInputs = K;
  RowScalar<A> c[K];

  struct Row {
    A c[K];
    RFK_HD A operator()(const A (&v)[K]) const {
      A sum = c[0] * v[0];
      for (int k = 1; k < K; ++k) sum += c[k] * v[k];
      return sum;
    }
  };
  RFK_HD Row row(RowIndex r) const {
    Row f;
    for (int k = 0; k < K; ++k) f.c[k] = c[k].at(r);
    return f;
  }
};

inline constexpr int kMaxTerms = 8;

// The state and the first velocity of a combination decide its types; one term has no velocity.
inline const TensorView& velocity_of(const std::vector<TensorView>& tensors) {
  return tensors.size() > 1 ? tensors[1] : tensors[0];
}

// Runs the op on checked tensors; `map_rows` is the back end.
template <typename MapRows>
void run_linear_combination(const MapRows& map_rows, const TensorView& out,
                            const std::vector<TensorView>& tensors, const TensorView& coefs) {
  RowArg rows[] = {{"coefs[k]", coefs.slice(0)}};
  const RowPlan plan = plan_rows("linear_combination", out, rows);
  dispatch_state("linear_combination", out, velocity_of(tensors), [&]<typename T, typename V>() {
    dispatch_int<1, kMaxTerms>(int64_t(tensors.size()), [&]<int K>() {
      using A = acc_t<T>;
      Inputs<T, V, K> in{tensors[0].ptr<T>()};
      LinearCombination<K, A> op;
      for (int k = 0; k < K; ++k) {
        if (k > 0) in.rest[k - 1] = tensors[k].ptr<V>();
        op.c[k] = rows[0].scalar<A>(k * coefs.stride[0]);
      }
      map_rows(out.ptr<T>(), in, plan, op);
    });
  });
}

}  // namespace rfk
