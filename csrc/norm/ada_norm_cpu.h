#pragma once

#include <omp.h>

#include <memory>

#include "core/check.h"
#include "core/quantize_cpu.h"
#include "norm/ada_norm.h"

namespace rfk {

// The rows of memory that are read next: fetched while a row is worked on in the cache.
struct Ahead {
  const char* row[2] = {};
  int64_t bytes = 0;  // of a value

  RFK_HD void fetch(int64_t begin, int64_t end) const {
    for (const char* r : row)
      for (int64_t at = begin * bytes; r && at < end * bytes; at += 64) __builtin_prefetch(r + at, 0, 2);
  }
};

// The sums of a row are made in lanes, in two chains: of squares about the mean, not of squares less its
// square.
template <typename A> RFK_HD A squares_about(const A* v, int64_t n, A mean) {
  const int64_t half = n / 2;
  A even = 0, odd = n % 2 ? (v[n - 1] - mean) * (v[n - 1] - mean) : A(0);
#pragma omp simd reduction(+ : even, odd)
  for (int64_t c = 0; c < half; ++c) {
    const A d = v[c] - mean, e = v[c + half] - mean;
    even += d * d;
    odd += e * e;
  }
  return even + odd;
}

template <typename A> RFK_HD A sum_of(const A* v, int64_t n) {
  const int64_t half = n / 2;
  A even = 0, odd = n % 2 ? v[n - 1] : A(0);
#pragma omp simd reduction(+ : even, odd)
  for (int64_t c = 0; c < half; ++c) {
    even += v[c];
    odd += v[c + half];
  }
  return even + odd;
}

template <typename A> RFK_HD Moments<A> moments_of(const A* v, int64_t n, Norm norm, A eps) {
  if (norm == Norm::none) return {};
  const A mean = norm == Norm::layer ? sum_of(v, n) / A(n) : A(0);
  return {mean, 1 / std::sqrt(squares_about(v, n, mean) / A(n) + eps)};
}

// The parameters of a group as vectors of the accumulator's type, kept while rows of the group follow.
template <typename A> struct Columns {
  A *weight, *bias, *factor, *shift;

  template <Tier kTier> RFK_HD Affine<A> at(int64_t c) const {
    if constexpr (kTier != Tier::fast) return {weight[c], bias[c], factor[c], shift[c]};
    return {1, 0, factor[c], shift[c]};
  }
  template <Tier kTier> RFK_HD void fold(int64_t n) const {
    if constexpr (kTier != Tier::fast) return;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {
      const Affine<A> k = Affine<A>{weight[c], bias[c], factor[c], shift[c]}.folded();
      factor[c] = k.factor;
      shift[c] = k.shift;
    }
  }
};

// What a thread needs beside the tensors.
template <typename T, typename M> struct AdaNormScratch {
  using A = acc_t<T>;
  std::unique_ptr<A[]> memory;
  A *v, *y;
  Columns<A> gate, norm;
  Parameters<M, A> filled{};
  bool valid = false;

  explicit AdaNormScratch(int64_t n) : memory(new A[10 * n]) {
    A* at = memory.get();
    for (A** vector : {&v, &y, &gate.weight, &gate.bias, &gate.factor, &gate.shift, &norm.weight, &norm.bias,
                       &norm.factor, &norm.shift}) {
      *vector = at;
      at += n;
    }
  }
};

// to[c] = f(from[c]), or `otherwise` everywhere.
template <typename A, typename M, typename F>
RFK_HD void widen(A* to, const M* from, int64_t n, A otherwise, F f) {
  if (!from) return void(std::fill(to, to + n, otherwise));
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[c] = f(A(load(from[c])));
}

template <Tier kTier, typename T, typename M>
RFK_HD void fill(const AdaNorm<T, M>& op, const Parameters<M, acc_t<T>>& p, AdaNormScratch<T, M>& s) {
  using A = acc_t<T>;
  if (s.valid && s.filled == p) return;
  const int64_t n = op.plan.cols;
  const A poison = p.poison;
  const auto same = [](A v) __attribute__((always_inline)) { return v; };
  if (op.y.data) {
    widen(s.gate.weight, op.branch_weight, n, A(1), same);
    widen<A, M>(s.gate.bias, nullptr, n, A(0), same);
    if (op.tanh)
      for (int64_t c = 0; c < n; ++c)
        s.gate.factor[c] = p.gate ? gate_factor<M>(A(load(p.gate[c])), kTier) : A(1);
    else
      widen(s.gate.factor, p.gate, n, A(1), same);
    widen<A, M>(s.gate.shift, nullptr, n, poison, same);
    s.gate.template fold<kTier>(n);
  }
  if (op.finishes()) {
    widen(s.norm.weight, op.weight, n, A(1), same);
    widen(s.norm.bias, op.bias, n, A(0), same);
    widen(s.norm.factor, p.scale, n, A(1),
          [](A v) __attribute__((always_inline)) { return scale_factor<M>(v, kTier); });
    widen(s.norm.shift, p.shift, n, poison, [=](A v) __attribute__((always_inline)) { return v + poison; });
    s.norm.template fold<kTier>(n);
  }
  s.filled = p;
  s.valid = poison == poison;
}

// r of a row, as it is stored, to s.v.
template <Tier kTier, typename T, typename M>
RFK_HD void gated_residual_row(const AdaNorm<T, M>& op, RowIndex at, AdaNormScratch<T, M>& s,
                               bool past_cache) {
  using A = acc_t<T>;
  const int64_t n = op.plan.cols;
  const T *x = op.x.at(at), *y = op.y.at(at);
  Moments<A> m;
  if (op.branch_norm != Norm::none) {
    widen(s.y, y, n, A(0), [](A value) __attribute__((always_inline)) { return value; });
    m = moments_of(s.y, n, op.branch_norm, op.eps);
  }
  A* const v = s.v;
  const Columns<A> gate = s.gate;
  write_row(op.x_out.at(at), n, past_cache, [=](int64_t c) __attribute__((always_inline)) {
    const A normed = (load(y[c]) - m.mean) * m.rstd;
    const T r = store<T>(load(x[c]) + modulate<M, kTier>(normed, gate.template at<kTier>(c)));
    v[c] = load(r);
    return r;
  });
}

template <Tier kTier, typename T, typename M>
RFK_SIMD void ada_norm_rows(const AdaNorm<T, M>& op, int64_t begin, int64_t end, AdaNormScratch<T, M>& s) {
  using A = acc_t<T>;
  const int64_t n = op.plan.cols, rows = op.plan.rows;
  const bool past_x = streams(op.x_out, op.plan.axes, rows, n),
             past_out = streams(op.out, op.plan.axes, rows, n),
             past_codes = streams(op.quantized.codes, op.plan.axes, rows, n);
  A* const v = s.v;
  for (int64_t row = begin; row < end; ++row) {
    const RowIndex at = op.plan.index(row);
    fill<kTier>(op, op.parameters(at), s);
    if (op.y.data)
      gated_residual_row<kTier>(op, at, s, past_x);
    else
      widen(v, op.x.at(at), n, A(0), [](A value) __attribute__((always_inline)) { return value; });
    if (!op.finishes()) continue;
    Ahead ahead;
    if (row + 1 < end) {
      const RowIndex next = op.plan.index(row + 1);
      ahead.row[0] = reinterpret_cast<const char*>(op.x.at(next));
      ahead.row[1] = op.y.data ? reinterpret_cast<const char*>(op.y.at(next)) : nullptr;
      ahead.bytes = sizeof(T);
    }
    const Moments<A> m = moments_of(v, n, op.norm, op.eps);
    const Columns<A> k = s.norm;
    const auto finish = [=](int64_t c) __attribute__((always_inline)) {
      return modulate<M, kTier>((v[c] - m.mean) * m.rstd, k.template at<kTier>(c));
    };
    const auto fetch = [=](int64_t first, int64_t last)
                           __attribute__((always_inline)) { ahead.fetch(first, last); };
    if (op.out.data) {
      const auto stored = [=](int64_t c) __attribute__((always_inline)) { return store<T>(finish(c)); };
      write_row(op.out.at(at), n, past_out, stored, fetch);
      continue;
    }
    write_row(v, n, false, finish, fetch);
    if constexpr (kTier != Tier::fast)
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) v[c] = rounded_to<T>(v[c]);
    const QuantizedRows& q = op.quantized;
    quantize_row(q, q.codes.at(at), q.scales.data ? q.scales.at(at) : nullptr, v, n, past_codes);
  }
  stream_fence();
}

// The CPU back end: threads over rows.
struct AdaNormCpu {
  template <typename Op> static void check_index(const Op& op) {
    for (int64_t row = 0; op.index.given() && row < op.plan.rows; ++row) {
      const int64_t g = op.index.at(op.plan.index(row));
      check(0 <= g && g < op.index.groups, op.name, ": index must be in 0..", op.index.groups - 1, ", got ",
            g, " for token ", row);
    }
  }

  template <typename T, typename M> void operator()(const AdaNorm<T, M>& op) const {
    const int64_t rows = op.plan.rows, cols = op.plan.cols;
    check_index(op);
#pragma omp parallel if (rows > 1 && rows * cols > (1 << 14))
    {
      const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
      AdaNormScratch<T, M> scratch(cols);
      switch (op.tier) {
        case Tier::fast: ada_norm_rows<Tier::fast>(op, begin, end, scratch); break;
        case Tier::exact: ada_norm_rows<Tier::exact>(op, begin, end, scratch); break;
        default: ada_norm_rows<Tier::exact_before_weight>(op, begin, end, scratch);
      }
    }
  }
};

}  // namespace rfk
