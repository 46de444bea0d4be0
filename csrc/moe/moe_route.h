#pragma once

#include "core/dispatch.h"
#include "core/math.h"
#include "moe/moe.h"

namespace rfk {

// The top k experts of a row, best first and the lowest of equals first, and their softmax weights. With a
// threshold, experts after those whose weights add up to it are left out: expert -1, weight 0.
template <typename T> struct Route {
  using A = acc_t<T>;
  const T* logits;
  int64_t stride;
  A* weights;
  int32_t* experts;
  int count, top_k;  // count: of experts
  bool normalize, adaptive;
  A threshold;

  RFK_HD void operator()(int64_t row) const {
    const T* const l = logits + row * stride;
    A* const w = weights + row * top_k;
    uint64_t taken = 0;
    A most = 0, total = 0, sum = 0;
    bool left = true;
    for (int j = 0; j < top_k; ++j) {
      int best = -1;
      A value = 0;
      for (int e = 0; e < count; ++e) {
        const A v = load(l[e]);
        if (taken >> e & 1 || (best >= 0 && !(v > value))) continue;
        best = e, value = v;
      }
      taken |= uint64_t(1) << best;
      if (j == 0) {
        most = value;
        for (int e = 0; e < count; ++e) total += exp_(A(load(l[e])) - most);
      }
      const A weight = exp_(value - most) / total;
      w[j] = left ? weight : A(0);
      experts[row * top_k + j] = left ? best : -1;
      sum += w[j];
      if (adaptive && sum >= threshold) left = false;
    }
    if (normalize)
      for (int j = 0; j < top_k; ++j) w[j] = w[j] / sum;
  }
};

// Calls f(Route) with the route of checked tensors.
template <typename F>
void with_route(const TensorView& weights, const TensorView& experts, const TensorView& logits,
                bool normalize, const std::optional<double>& threshold, F&& f) {
  dispatch_float("moe_route", logits.dtype, [&]<typename T>() {
    using A = acc_t<T>;
    f(Route<T>{logits.ptr<T>(), logits.stride[0], weights.ptr<A>(), experts.ptr<int32_t>(),
               int(logits.shape[1]), int(weights.shape[1]), normalize, threshold.has_value(),
               A(threshold.value_or(0))});
  });
}

}  // namespace rfk
