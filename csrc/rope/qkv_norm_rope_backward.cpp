#include "rope/qkv_norm_rope_backward.h"

#include <algorithm>
#include <cstring>

#include "core/backend.h"
#include "rope/heads_cpu.h"
#include "rope/rope.h"

namespace rfk {
namespace {

// dx of one vector from g, which holds dy turned back and then u; adds g x^ to d_weight.
template <typename A> RFK_HD void norm_vector_backward(A* g, A* x, const A* w, A* d_weight, int d, A eps) {
  using namespace heads_cpu;
  const A inv_rms = inverse_rms(dot(x, x, d), d, eps);
  for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
    for (int j = i; j < i + kChunk; ++j) {
      x[j] *= inv_rms;
      d_weight[j] += g[j] * x[j];
      g[j] *= w[j];
    }
  }
  const A mean = dot(g, x, d) / A(d);
  for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
    for (int j = i; j < i + kChunk; ++j) g[j] = norm_backward(g[j], x[j], inv_rms, mean);
  }
}

// Tokens begin .. end - 1 of a part; d_weight [d]: their sum of dw, null for values.
template <typename T, typename M>
RFK_SIMD void rope_tokens_backward(const HeadPlan& plan, const HeadPart& part, int64_t begin, int64_t end,
                                   acc_t<T>* d_weight) {
  using namespace heads_cpu;
  using A = acc_t<T>;
  Vector<A> x, dy, g, w, sum;
  Row<A> row;
  const int d = plan.d;
  const M* weight = static_cast<const M*>(part.weight);
  if (weight) load_vector(w.v, weight, d);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / part.length, l = t % part.length;
    const A* angles = part.y.data ? plan.row<A>(part, b, l) : nullptr;
    if (angles) row.set(angles, d, Turn::back);
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
        norm_vector_backward(gradient, x.v, w.v, sum.v, d, A(plan.eps));
      }
      store_vector(to, gradient, d);
    }
  }
  if (d_weight) std::copy(sum.v, sum.v + d, d_weight);
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
