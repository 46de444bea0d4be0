#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "rope/heads.h"

// Checks the tensors of a call and makes its HeadPlan.

namespace rfk {

// The arguments that the forward and the backward share.
struct HeadArgs {
  const char* op;
  const std::vector<TensorView>& tensors;  // per stream: qkv, or q, k, v
  const std::vector<TensorView>& weights;  // none, or two per stream, of q and k; [0]: no norm
  const std::optional<TensorView>& rotation;
  int64_t per_stream, heads, kv_heads;
  int64_t first_row;  // of the rotation, for token 0 of the first stream
  double eps;

  int64_t streams() const { return int64_t(tensors.size()) / per_stream; }
  const TensorView& tensor(int64_t stream, int which) const {
    return tensors[stream * per_stream + (per_stream == 3 ? which : 0)];
  }
  // of q, k or v, or of all three in one
  const char* name(int which) const {
    return per_stream == 1 ? "qkv" : which == 0 ? "q" : which == 1 ? "k" : "v";
  }
  int64_t heads_of(int which) const { return which == 0 ? heads : kv_heads; }
  int64_t heads_in(int which) const { return per_stream == 1 ? heads + 2 * kv_heads : heads_of(which); }
};

enum class HeadLayout { bhld, blhd };

inline HeadLayout layout_of(const char* op, const std::string& name) {
  check(name == "bhld" || name == "blhd", op, ": layout must be bhld or blhd, got ", name);
  return name == "bhld" ? HeadLayout::bhld : HeadLayout::blhd;
}

inline Tier tier_of(const char* op, const std::string& name) {
  if (name == "fast") return Tier::fast;
  if (name == "exact") return Tier::exact;
  check(name == "exact_before_weight", op, ": tier must be fast, exact or exact_before_weight, got ", name);
  return Tier::exact_before_weight;
}

inline void check_no_gaps(const char* op, const char* what, const TensorView& t) {
  check(t.shape[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1, op, ": ", what,
        " must have no gaps along its last axis, got ", t, " with stride ", t.stride[t.ndim - 1]);
}

// The heads from `first` on of [batch, tokens, heads d] or [batch, tokens, heads, d].
inline Heads input_heads(const TensorView& t, int64_t first, int64_t d) {
  const int64_t head = t.ndim == 4 ? t.stride[2] : d;
  return {static_cast<char*>(t.data) + first * head * size_of(t.dtype), t.stride[0], t.stride[1], head};
}

// The heads of [batch, heads, tokens, d] or [batch, tokens, heads, d] from token `start` on.
inline Heads output_heads(const TensorView& t, HeadLayout layout, int64_t start) {
  const int token = layout == HeadLayout::bhld ? 2 : 1;
  return {static_cast<char*>(t.data) + start * t.stride[token] * size_of(t.dtype), t.stride[0],
          t.stride[token], t.stride[3 - token]};
}

// Checks a joint result (or its gradient) of `length` tokens.
inline void check_output(const HeadArgs& a, const char* what, const TensorView& t, HeadLayout layout,
                         int64_t heads, int64_t length, const HeadPlan& plan) {
  const bool heads_first = layout == HeadLayout::bhld;
  const int64_t second = heads_first ? heads : length, third = heads_first ? length : heads;
  check(t.has_shape({plan.batch, second, third, plan.d}) && t.dtype == plan.tokens &&
            t.device == a.tensors[0].device,
        a.op, ": ", what, " must be ", name_of(plan.tokens), "[", plan.batch, ", ", second, ", ", third, ", ",
        plan.d, "] on the device of ", a.tensors[0], ", got ", t);
  check_no_gaps(a.op, what, t);
}

namespace head_plan {

inline int64_t head_dim(const HeadArgs& a) {
  check(a.per_stream == 1 || a.per_stream == 3, a.op, ": expected 1 or 3 tensors per stream, got ",
        a.per_stream);
  check(!a.tensors.empty() && a.tensors.size() % a.per_stream == 0 && a.streams() <= kMaxStreams, a.op,
        ": expected 1..", kMaxStreams, " streams, got ", a.tensors.size(), " tensors");
  check(a.heads >= 1 && a.kv_heads >= 1 && a.heads % a.kv_heads == 0, a.op,
        ": heads must be a multiple of kv_heads, both positive, got ", a.heads, " and ", a.kv_heads);
  const TensorView& t = a.tensors[0];
  check(t.ndim == 3 || (t.ndim == 4 && a.per_stream == 3), a.op, ": ", a.name(0),
        " must be [batch, tokens, width]", a.per_stream == 3 ? " or [batch, tokens, heads, d]" : "", ", got ",
        t);
  check(t.ndim == 4 || t.shape[2] % a.heads_in(0) == 0, a.op, ": the width of ", a.name(0),
        " must be a multiple of its ", a.heads_in(0), " heads, got ", t);
  const int64_t d = t.ndim == 4 ? t.shape[3] : t.shape[2] / a.heads_in(0);
  check(2 <= d && d <= kMaxHeadDim && d % 2 == 0, a.op, ": the head dim must be even, 2..", kMaxHeadDim,
        ", got ", d, " of ", t);
  return d;
}

inline void check_tensor(const HeadArgs& a, int64_t stream, int which, int64_t batch, int64_t d) {
  const TensorView& t = a.tensor(stream, which);
  const TensorView& q = a.tensor(stream, 0);
  const int64_t heads = a.heads_in(which);
  const bool flat = t.ndim == 3 && t.shape[2] == heads * d;
  const bool split = a.per_stream == 3 && t.ndim == 4 && t.shape[2] == heads && t.shape[3] == d;
  check((flat || split) && t.shape[0] == batch && t.shape[1] == q.shape[1], a.op, ": ", a.name(which),
        " of stream ", stream, " must be [", batch, ", ", q.shape[1], ", ", heads, " * ", d, "], got ", t);
  check(t.dtype == a.tensors[0].dtype && t.device == a.tensors[0].device, a.op,
        ": expected one dtype and device, got ", a.tensors[0], " and ", t);
  check_no_gaps(a.op, a.name(which), t);
}

inline void add_rotation(HeadPlan& plan, const HeadArgs& a) {
  if (!a.rotation) return;
  const TensorView& r = *a.rotation;
  const int n = r.ndim;
  const bool fits = n == 3 || (n == 4 && (r.shape[0] == plan.batch || r.shape[0] == 1));
  check(fits && r.shape[n - 2] == plan.d / 2 && r.shape[n - 1] == 2, a.op, ": rotation must be [rows, ",
        plan.d / 2, ", 2] or [", plan.batch, ", rows, ", plan.d / 2, ", 2], got ", r);
  check(r.dtype == acc_of(plan.tokens) && r.device == a.tensors[0].device, a.op, ": rotation must be ",
        name_of(acc_of(plan.tokens)), " on the device of ", a.tensors[0], ", got ", r);
  check(r.numel() == 0 || (r.stride[n - 1] == 1 && (plan.d == 2 || r.stride[n - 2] == 2)), a.op,
        ": rotation must have no gaps along its last two axes, got ", r);
  plan.rotation = r.data;
  plan.rotation_token = r.stride[n - 3];
  plan.rotation_sample = n == 4 && r.shape[0] > 1 ? r.stride[0] : 0;
}

inline void add_weights(HeadPlan& plan, const HeadArgs& a) {
  plan.weights = plan.tokens;
  check(a.weights.empty() || int64_t(a.weights.size()) == 2 * a.streams(), a.op,
        ": expected no weights or two per stream, got ", a.weights.size(), " for ", a.streams());
  const auto full = [&](size_t i) { return a.heads_of(i % 2) * plan.d; };
  for (size_t i = 0; i < a.weights.size(); ++i)
    plan.full_width = plan.full_width || (full(i) != plan.d && a.weights[i].has_shape({full(i)}));
  const TensorView* first = nullptr;
  for (size_t i = 0; i < a.weights.size(); ++i) {
    const TensorView& w = a.weights[i];
    if (w.has_shape({0})) continue;
    const char* what = i % 2 ? "k_weight" : "q_weight";
    check(w.has_shape({plan.full_width ? full(i) : plan.d}) && w.device == a.tensors[0].device, a.op, ": ",
          what, " must be [", plan.d, "] or, as all weights of the call, [", full(i), "] on the device of ",
          a.tensors[0], ", got ", w);
    check(w.dtype == plan.tokens || (w.dtype == DType::f32 && size_of(plan.tokens) == 2), a.op, ": ", what,
          " must have the dtype of ", a.tensors[0], ", or be f32 beside 16-bit tokens, got ", w);
    check(!first || w.dtype == first->dtype, a.op, ": expected weights of one dtype, got ",
          first ? *first : w, " and ", w);
    check_no_gaps(a.op, what, w);
    first = &w;
    plan.weights = w.dtype;
    plan.part[i / 2 * 3 + i % 2].weight = w.data;
  }
}

}  // namespace head_plan

// The plan of all but y and dx.
inline HeadPlan plan_heads(const HeadArgs& a) {
  HeadPlan plan;
  plan.d = int(head_plan::head_dim(a));
  plan.batch = a.tensors[0].shape[0];
  plan.tokens = a.tensors[0].dtype;
  plan.eps = a.eps;
  head_plan::add_rotation(plan, a);
  int64_t first_row = a.first_row;
  for (int64_t stream = 0; stream < a.streams(); ++stream) {
    for (int which = 0; which < 3; ++which) {
      head_plan::check_tensor(a, stream, which, plan.batch, plan.d);
      const TensorView& t = a.tensor(stream, which);
      const int64_t first = a.per_stream == 3 || which == 0 ? 0 : a.heads + (which - 1) * a.kv_heads;
      HeadPart& part = plan.part[plan.parts++];
      part.x = input_heads(t, first, plan.d);
      part.length = t.shape[1];
      part.heads = int(a.heads_of(which));
      part.row = first_row;
      part.rows = a.rotation && which < 2 ? a.rotation->shape[a.rotation->ndim - 3] : 0;
    }
    first_row += plan.part[plan.parts - 1].length;
  }
  head_plan::add_weights(plan, a);
  return plan;
}

}  // namespace rfk
