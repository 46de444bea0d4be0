#pragma once

#include <algorithm>

#include "rope/plan.h"

namespace rfk {

// The bytes that a tensor spans.
struct Extent {
  const char *begin, *end;

  explicit Extent(const TensorView& t) : begin(static_cast<const char*>(t.data)), end(begin) {
    if (t.numel() == 0) return;
    int64_t last = 1;
    for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
    end += last * size_of(t.dtype);
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// A result has one place for every element, and none that is read or written elsewhere.
inline void check_places(const HeadArgs& a, std::initializer_list<const TensorView*> outs) {
  for (const TensorView* out : outs) {
    for (int i = 0; i < out->ndim; ++i)
      check(out->shape[i] == 1 || out->stride[i] > 0, a.op, ": out must have no overlap within, got ", *out,
            " with stride ", out->stride[i]);
    for (const TensorView& t : a.tensors)
      check(!Extent(*out).meets(Extent(t)), a.op, ": out must share no memory with the inputs, got ", *out,
            " across ", t);
    for (const TensorView* other : outs)
      check(out == other || out->numel() == 0 || out->data != other->data, a.op,
            ": q, k and v of out must be different memory, got ", *out, " twice");
  }
}

// Checks all of the forward's tensors.
inline HeadPlan plan_qkv_norm_rope(const TensorView& q, const TensorView& k, const TensorView& v,
                                   const HeadArgs& a, int64_t rotate_from, const std::string& layout_name,
                                   const std::string& tier, bool with_v) {
  const HeadLayout layout = layout_of(a.op, layout_name);
  HeadPlan plan = plan_heads(a);
  plan.tier = tier_of(a.op, tier);
  int64_t length = 0;
  for (int i = 0; i < plan.parts; i += 3) length += plan.part[i].length;
  const int64_t rows = plan.part[0].rows;
  check(0 <= rotate_from && (!a.rotation || rotate_from + rows <= length), a.op,
        ": rotate_from must be 0 or more and rotate_from + rows at most the ", length, " tokens, got ",
        rotate_from, " + ", rows);
  const TensorView* outs[] = {&q, &k, &v};
  check(with_v || v.has_shape({0}), a.op, ": out v must be [0] without values, got ", v);
  for (int which = 0; which < (with_v ? 3 : 2); ++which)
    check_output(a,
                 which == 0   ? "out q"
                 : which == 1 ? "out k"
                              : "out v",
                 *outs[which], layout, a.heads_of(which), length, plan);
  check_places(a, {&q, &k, &v});
  int64_t start = 0;
  for (int i = 0; i < plan.parts; ++i) {
    HeadPart& part = plan.part[i];
    if (i % 3 == 2 && !with_v) {
      part.length = 0;
    } else {
      part.y = output_heads(*outs[i % 3], layout, start);
    }
    if (i % 3 == 2) start += plan.part[i - 1].length;
  }
  return plan;
}

}  // namespace rfk
