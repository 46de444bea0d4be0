#include "rope/qkv_norm_rope_backward.h"

#include <algorithm>
#include <cstring>

#include "core/backend.h"
#include "rope/heads_cpu.h"
#include "rope/rope.h"

namespace rfk {
namespace {

using namespace heads_cpu;

// From dy turned back to u; adds g x^ to d_weight. x becomes x^.
template <typename A> RFK_HD void weigh_vector(A* g, A* x, const A* w, A* d_weight, int d, A inv_rms) {
  for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
    for (int j = i; j < i + kChunk; ++j) {
      x[j] *= inv_rms;
      d_weight[j] += g[j] * x[j];
      g[j] *= w[j];
    }
  }
}

// From u to dx; mean: of u x^.
template <typename A> RFK_HD void norm_vector_backward(A* u, const A* x_hat, int d, A inv_rms, A mean) {
  for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
    for (int j = i; j < i + kChunk; ++j) u[j] = norm_backward(u[j], x_hat[j], inv_rms, mean);
  }
}

template <typename A> struct Buffers {
  Vector<A> x, dy, g, w, sum;
  Row<A> row;
};

// dx of a token whose norm is over all heads; adds g x^ to d_weight [heads d]. row: null where not turned.
template <typename T, typename M>
RFK_HD void full_width_backward(const HeadPlan& plan, const HeadPart& part, int64_t b, int64_t l,
                                Buffers<acc_t<T>>& at, const Row<acc_t<T>>* row, acc_t<T>* d_weight) {
  using A = acc_t<T>;
  const int d = plan.d;
  const M* weight = static_cast<const M*>(part.weight);
  A* const g = row ? at.g.v : at.dy.v;
  A squares = 0, product = 0;
  for (int h = 0; h < part.heads; ++h) {
    load_vector(at.x.v, part.x.at<T>(b, l, h), d);
    load_vector(at.dy.v, part.y.at<T>(b, l, h), d);
    load_vector(at.w.v, weight + h * d, d);
    if (row) rotate_vector(g, at.dy.v, *row, d);
    squares += dot(at.x.v, at.x.v, d);
    for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
      for (int j = i; j < i + kChunk; ++j) g[j] *= at.w.v[j];
    }
    product += dot(g, at.x.v, d);
  }
  const A inv_rms = inverse_rms(squares, part.heads * d, A(plan.eps));
  const A mean = inv_rms * product / A(part.heads * d);
  for (int h = 0; h < part.heads; ++h) {
    load_vector(at.x.v, part.x.at<T>(b, l, h), d);
    load_vector(at.dy.v, part.y.at<T>(b, l, h), d);
    load_vector(at.w.v, weight + h * d, d);
    load_vector(at.sum.v, d_weight + h * d, d);
    if (row) rotate_vector(g, at.dy.v, *row, d);
    weigh_vector(g, at.x.v, at.w.v, at.sum.v, d, inv_rms);
    norm_vector_backward(g, at.x.v, d, inv_rms, mean);
    store_vector(d_weight + h * d, at.sum.v, d);
    store_vector(part.dx.at<T>(b, l, h), g, d);
  }
}

// Tokens begin .. end - 1 of a part; d_weight: their sum of dw, null for values.
template <typename T, typename M>
RFK_SIMD void rope_tokens_backward(const HeadPlan& plan, const HeadPart& part, int64_t begin, int64_t end,
                                   acc_t<T>* d_weight) {
  using A = acc_t<T>;
  Buffers<A> buffers;
  auto& [x, dy, g, w, sum, row] = buffers;
  const int d = plan.d;
  const M* weight = static_cast<const M*>(part.weight);
  if (weight) load_vector(w.v, weight, d);
  if (d_weight) std::fill(d_weight, d_weight + plan.norm_width(part), A(0));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / part.length, l = t % part.length;
    const A* angles = part.y.data ? plan.row<A>(part, b, l) : nullptr;
    if (angles) row.set(angles, d, Turn::back);
    if (weight && plan.full_width && part.y.data) {
      full_width_backward<T, M>(plan, part, b, l, buffers, angles ? &row : nullptr, d_weight);
      continue;
    }
    for (int h = 0; h < part.heads; ++h) {
      T* to = part.dx.at<T>(b, l, h);
      if (!part.y.data) {
        std::fill(to, to + d, T{});
        continue;
      }
      const T* from = part.y.at<T>(b, l, h);
      if (!weight && !angles) {
        std::memcpy(to, from, d * sizeof(T));
        continue;
      }
      A* const gradient = angles ? g.v : dy.v;
      load_vector(dy.v, from, d);
      if (angles) rotate_vector(g.v, dy.v, row, d);
      if (weight) {
        load_vector(x.v, part.x.at<T>(b, l, h), d);
        const A inv_rms = inverse_rms(dot(x.v, x.v, d), d, A(plan.eps));
        weigh_vector(gradient, x.v, w.v, sum.v, d, inv_rms);
        norm_vector_backward(gradient, x.v, d, inv_rms, dot(gradient, x.v, d) / A(d));
      }
      store_vector(to, gradient, d);
    }
  }
  if (d_weight && !plan.full_width) std::copy(sum.v, sum.v + d, d_weight);
}

// A task is one split of one part: the sums do not depend on the number of threads.
void run(const HeadPlan& plan) {
  dispatch_heads("qkv_norm_rope_backward", plan, [&]<typename T, typename M>() {
#pragma omp parallel for schedule(dynamic) if (plan.batch * plan.part[0].length * plan.d > 4096)
    for (int64_t task = 0; task < 3 * plan.splits; ++task) {
      const HeadPart& part = plan.part[task / plan.splits];
      const int64_t split = task % plan.splits, tokens = plan.batch * part.length;
      auto* d_weight = static_cast<acc_t<T>*>(part.dweight);
      rope_tokens_backward<T, M>(plan, part, split_begin(tokens, split, plan.splits),
                                 split_begin(tokens, split + 1, plan.splits),
                                 d_weight ? d_weight + split * plan.split_stride : nullptr);
    }
  });
}

}  // namespace

void qkv_norm_rope_backward(Stream stream, const TensorView& d_tokens, const TensorView& d_weights,
                            const std::optional<TensorView>& dq, const std::optional<TensorView>& dk,
                            const std::optional<TensorView>& dv, const std::vector<TensorView>& tensors,
                            const std::vector<TensorView>& weights, const std::optional<TensorView>& rotation,
                            int64_t per_stream, int64_t heads, int64_t kv_heads, int64_t start,
                            int64_t rotate_from, double eps, const std::string& layout) {
  const char* op = "qkv_norm_rope_backward";
  if (d_tokens.device.type == DeviceType::cpu) {
    const HeadArgs args{op, tensors, weights, rotation, per_stream, heads, kv_heads, start - rotate_from,
                        eps};
    return run(plan_qkv_norm_rope_backward(d_tokens, d_weights, dq, dk, dv, args, start, layout));
  }
  if constexpr (kWithCuda)
    return qkv_norm_rope_backward_cuda(stream, d_tokens, d_weights, dq, dk, dv, tensors, weights, rotation,
                                       per_stream, heads, kv_heads, start, rotate_from, eps, layout);
  fail_without_cuda(op);
}

}  // namespace rfk
