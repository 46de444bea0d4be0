#pragma once

#include <limits>
#include <vector>

#include "core/dispatch.h"
#include "core/map_rows.h"
#include "core/math.h"

namespace rfk {

inline constexpr int kMaxParts = 8;

// e^(l_k - shift) of the logarithms l_k of the sums of parts, and their sum. A part of -infinity counts 0,
// all of them 0 together.
template <int K, typename A> struct PartWeights {
  A weight[K], sum = 0, shift;

  RFK_HD explicit PartWeights(const A (&l)[K]) : shift(l[0]) {
    for (int k = 1; k < K; ++k) shift = detail::select(l[k] > shift, l[k], shift);
    const A finite = std::numeric_limits<A>::max();
    shift = detail::select(std::fabs(shift) <= finite, shift, A(0));  // infinity - infinity is no number
    for (int k = 0; k < K; ++k) sum += weight[k] = exp_(l[k] - shift);
  }
};

// log(sum_k e^(l_k)).
template <int K, typename A> struct MergedSum {
  static constexpr int kInputs = K;

  struct Row {
    RFK_HD A operator()(const A (&l)[K]) const {
      const PartWeights<K, A> parts(l);
      return detail::select(parts.sum == 0, -std::numeric_limits<A>::infinity(),
                            parts.shift + log_(parts.sum));
    }
  };
  RFK_HD Row row(RowIndex) const { return {}; }
};

// sum_k e^(l_k) y_k / sum_k e^(l_k), from left to right; a part of -infinity is left out whatever y_k is.
template <int K, typename A> struct AttentionMerge {
  static constexpr int kInputs = K;
  RowScalar<A> lse[K];

  struct Row {
    A share[K];
    bool present[K];
    RFK_HD A operator()(const A (&v)[K]) const {
      A sum = 0;
      for (int k = 0; k < K; ++k) sum += detail::select(present[k], share[k] * v[k], A(0));
      return sum;
    }
  };
  RFK_HD Row row(RowIndex r) const {
    A l[K];
    for (int k = 0; k < K; ++k) l[k] = lse[k].at(r);
    const PartWeights<K, A> parts(l);
    Row f;
    for (int k = 0; k < K; ++k) {
      f.share[k] = parts.weight[k] / parts.sum;
      f.present[k] = l[k] != -std::numeric_limits<A>::infinity();
    }
    return f;
  }
};

// Runs the op on checked tensors; `map_rows` is the back end. The results may lie where a part lies.
template <typename MapRows>
void run_attention_merge(const MapRows& map_rows, const TensorView& out, const TensorView& lse,
                         const std::vector<TensorView>& outs, const std::vector<TensorView>& lses) {
  RowArg rows[kMaxParts];
  for (size_t k = 0; k < lses.size(); ++k) rows[k] = {"lses[k]", lses[k]};
  const RowPlan plan = plan_rows("attention_merge", out, {rows, lses.size()});
  const RowPlan flat{.cols = lse.numel()};
  dispatch_float("attention_merge", out.dtype, [&]<typename T>() {
    dispatch_int<1, kMaxParts>(int64_t(outs.size()), [&]<int K>() {
      using A = acc_t<T>;
      Inputs<T, T, K> parts{outs[0].ptr<T>()};
      Inputs<A, A, K> sums{lses[0].ptr<A>()};
      AttentionMerge<K, A> op;
      for (int k = 0; k < K; ++k) {
        if (k > 0) parts.rest[k - 1] = outs[k].ptr<T>();
        if (k > 0) sums.rest[k - 1] = lses[k].ptr<A>();
        op.lse[k] = rows[k].scalar<A>();
      }
      map_rows(out.ptr<T>(), parts, plan, op);
      map_rows(lse.ptr<A>(), sums, flat, MergedSum<K, A>{});
    });
  });
}

}  // namespace rfk
