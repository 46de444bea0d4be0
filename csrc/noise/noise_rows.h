#pragma once

#include "core/dispatch.h"
#include "core/rows.h"
#include "noise/philox.h"

// noise_rows: out[b, i] = f(i', z) with z what sample b draws at element i and i' its index in the whole
// tensor. An op names its `Draw`, float (normal) or uint32_t (a word), and holds `Row row(RowIndex)`, and Row
// `T operator()(int64_t at, Draw z)`; the keys hold `NoiseKey of(int64_t sample)`.
// NoiseRowsCpu (noise_rows_cpu.h) and NoiseRowsCuda (noise_rows.cuh) are the loops.

namespace rfk {

// The noise itself.
template <typename T> struct PhiloxNormal {
  using Draw = float;
  struct Row {
    RFK_HD T operator()(int64_t, float z) const { return store<T>(z); }
  };
  RFK_HD Row row(RowIndex) const { return {}; }
};

// k x + c z: noise added to a state, e.g. from sigma_a up to sigma_b by k = (1 - sigma_b) / (1 - sigma_a),
// c = sqrt(sigma_b^2 - k^2 sigma_a^2).
template <typename T> struct Renoise {
  using Draw = float;
  const T* x;
  RowScalar<acc_t<T>> k, c;

  struct Row {
    const T* x;
    acc_t<T> k, c;
    RFK_HD T operator()(int64_t at, float z) const { return store<T>(k * load(x[at]) + c * acc_t<T>(z)); }
  };
  RFK_HD Row row(RowIndex r) const { return {x, k.at(r), c.at(r)}; }
};

// `samples` rows of `size` elements; `plan` is the same tensor by row scalars.
struct NoiseShape {
  int64_t samples, size;
  RowPlan plan;
};

inline NoiseKeys keys_of(const TensorView& keys) {
  return {keys.ptr<int64_t>(), keys.stride[0], keys.stride[1]};
}

template <typename NoiseRows>
void run_philox_normal(const NoiseRows& noise_rows, const TensorView& out, const TensorView& keys) {
  const NoiseShape shape{out.shape[0], out.numel() / out.shape[0], plan_rows("philox_normal", out, {})};
  dispatch_float("philox_normal", out.dtype,
                 [&]<typename T>() { noise_rows(out.ptr<T>(), keys_of(keys), shape, PhiloxNormal<T>{}); });
}

template <typename NoiseRows>
void run_renoise(const NoiseRows& noise_rows, const TensorView& out, const TensorView& x, const TensorView& k,
                 const TensorView& c, const TensorView& keys) {
  RowArg rows[] = {{"k", k}, {"c", c}};
  const NoiseShape shape{x.shape[0], x.numel() / x.shape[0], plan_rows("renoise", x, rows)};
  dispatch_float("renoise", x.dtype, [&]<typename T>() {
    using A = acc_t<T>;
    noise_rows(out.ptr<T>(), keys_of(keys), shape,
               Renoise<T>{x.ptr<T>(), rows[0].scalar<A>(), rows[1].scalar<A>()});
  });
}

}  // namespace rfk
