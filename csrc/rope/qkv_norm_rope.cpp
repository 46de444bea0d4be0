#include "rope/qkv_norm_rope.h"

#include <cstring>

#include "core/backend.h"
#include "core/stream_store.h"
#include "rope/heads_cpu.h"
#include "rope/rope.h"

namespace rfk {
namespace {

constexpr int64_t kTokens = 16;  // of one task: outweighs taking it

// 1 / rms of a token, over all heads; x is overwritten.
template <typename T>
RFK_HD acc_t<T> full_inverse_rms(const HeadPlan& plan, const HeadPart& part, int64_t b, int64_t l,
                                 acc_t<T>* x) {
  acc_t<T> squares = 0;
  for (int h = 0; h < part.heads; ++h) {
    heads_cpu::load_vector(x, part.x.at<T>(b, l, h), plan.d);
    squares += heads_cpu::dot(x, x, plan.d);
  }
  return inverse_rms(squares, part.heads * plan.d, acc_t<T>(plan.eps));
}

// Tokens begin .. end - 1 of a part, counted through its samples.
template <typename T, typename M, Tier kTier>
RFK_SIMD void rope_tokens(const HeadPlan& plan, const HeadPart& part, int64_t begin, int64_t end, bool past) {
  using namespace heads_cpu;
  using A = acc_t<T>;
  Vector<A> x, y, w;
  Row<A> row;
  alignas(64) T buffer[kMaxHeadDim];
  const int d = plan.d;
  const M* weight = static_cast<const M*>(part.weight);
  const bool full_width = weight && plan.full_width;
  if (weight) load_vector(w.v, weight, d);
  int64_t b = begin / part.length, l = begin % part.length;
  for (int64_t t = begin; t < end; ++t) {
    const A* angles = plan.row<A>(part, b, l);
    if (angles) row.set(angles, d, Turn::forth);
    A inv_rms = full_width ? full_inverse_rms<T>(plan, part, b, l, x.v) : A(0);
    for (int h = 0; h < part.heads; ++h) {
      const T* from = part.x.at<T>(b, l, h);
      T* to = part.y.at<T>(b, l, h);
      T* const out = past ? buffer : to;
      if (!weight && !angles) {
        std::memcpy(out, from, d * sizeof(T));
      } else {
        load_vector(x.v, from, d);
        if (weight) {
          if (full_width)
            load_vector(w.v, weight + h * d, d);
          else
            inv_rms = inverse_rms(dot(x.v, x.v, d), d, A(plan.eps));
          for (int i = 0; i < d; i += kChunk) {
#pragma omp simd
            for (int j = i; j < i + kChunk; ++j) x.v[j] = normalise<T, M>(x.v[j], inv_rms, w.v[j], kTier);
          }
        }
        if (angles) rotate_vector(y.v, x.v, row, d);
        store_vector(out, angles ? y.v : x.v, d);
      }
      if (past) stream_store(to, buffer, d * sizeof(T));
    }
    if (++l == part.length) l = 0, ++b;
  }
  if (past) stream_fence();
}

template <typename T, typename M> auto rope_tokens_of(Tier tier) {
  if constexpr (sizeof(T) == 2) {
    if (tier == Tier::exact) return rope_tokens<T, M, Tier::exact>;
    if (tier == Tier::exact_before_weight) return rope_tokens<T, M, Tier::exact_before_weight>;
  }
  return rope_tokens<T, M, Tier::fast>;  // nothing else rounds
}

void run(HeadPlan& plan) {
  int64_t blocks = 0, vectors = 0;
  for (int i = 0; i < plan.parts; ++i) {
    HeadPart& part = plan.part[i];
    part.first_block = blocks;
    blocks += (plan.batch * part.length + kTokens - 1) / kTokens;
    vectors += plan.batch * part.length * part.heads;
  }
  const int64_t bytes = vectors * plan.d * size_of(plan.tokens);
  const bool large = should_stream(nullptr, bytes) && plan.d * size_of(plan.tokens) % 16 == 0;
  dispatch_heads("qkv_norm_rope", plan, [&]<typename T, typename M>() {
    const auto tokens = rope_tokens_of<T, M>(plan.tier);
#pragma omp parallel for schedule(dynamic) if (bytes > (64 << 10))
    for (int64_t block = 0; block < blocks; ++block) {
      int i = 0;
      while (i + 1 < plan.parts && plan.part[i + 1].first_block <= block) ++i;
      const HeadPart& part = plan.part[i];
      const int64_t begin = (block - part.first_block) * kTokens;
      const int64_t size = sizeof(T);
      const bool past = large && (uintptr_t(part.y.data) | uintptr_t(part.y.sample * size) |
                                  uintptr_t(part.y.token * size) | uintptr_t(part.y.head * size)) %
                                         16 ==
                                     0;
      tokens(plan, part, begin, std::min(begin + kTokens, plan.batch * part.length), past);
    }
  });
}

}  // namespace

void qkv_norm_rope(Stream stream, const TensorView& q, const TensorView& k, const TensorView& v,
                   const std::vector<TensorView>& tensors, const std::vector<TensorView>& weights,
                   const std::optional<TensorView>& rotation, int64_t per_stream, int64_t heads,
                   int64_t kv_heads, int64_t rotate_from, double eps, const std::string& layout,
                   const std::string& tier, bool with_v) {
  const char* op = "qkv_norm_rope";
  if (q.device.type == DeviceType::cpu) {
    const HeadArgs args{op, tensors, weights, rotation, per_stream, heads, kv_heads, -rotate_from, eps};
    HeadPlan plan = plan_qkv_norm_rope(q, k, v, args, rotate_from, layout, tier, with_v);
    return run(plan);
  }
  if constexpr (kWithCuda)
    return qkv_norm_rope_cuda(stream, q, k, v, tensors, weights, rotation, per_stream, heads, kv_heads,
                              rotate_from, eps, layout, tier, with_v);
  fail_without_cuda(op);
}

}  // namespace rfk
