#pragma once

#include "rope/plan.h"

namespace rfk {

// Checks all of the backward's tensors. args.first_row: of the rotation, for the first token of the stream.
inline HeadPlan plan_qkv_norm_rope_backward(const TensorView& d_tokens, const TensorView& d_weights,
                                            const std::optional<TensorView>& dq,
                                            const std::optional<TensorView>& dk,
                                            const std::optional<TensorView>& dv, const HeadArgs& a,
                                            int64_t start, const std::string& layout_name) {
  const HeadLayout layout = layout_of(a.op, layout_name);
  HeadPlan plan = plan_heads(a);
  check(plan.parts == 3, a.op, ": expected the tensors of one stream, got ", plan.parts / 3, " streams");
  const int64_t length = plan.part[0].length, width = (a.heads + 2 * a.kv_heads) * plan.d;
  check(d_tokens.has_shape({plan.batch, length, width}) && d_tokens.dtype == plan.tokens &&
            d_tokens.device == a.tensors[0].device,
        a.op, ": d_tokens must be ", name_of(plan.tokens), "[", plan.batch, ", ", length, ", ", width,
        "] on the device of ", a.tensors[0], ", got ", d_tokens);
  check_no_gaps(a.op, "d_tokens", d_tokens);
  const int64_t of_q = plan.norm_width(plan.part[0]), sums = of_q + plan.norm_width(plan.part[1]);
  check(d_weights.ndim == 2 && d_weights.shape[1] == sums && d_weights.shape[0] >= 1 &&
            d_weights.dtype == acc_of(plan.tokens) && d_weights.is_contiguous() &&
            d_weights.device == a.tensors[0].device,
        a.op, ": d_weights must be ", name_of(acc_of(plan.tokens)), "[splits, ", sums,
        "], contiguous, on the device of ", a.tensors[0], ", got ", d_weights);
  plan.splits = d_weights.shape[0];
  plan.split_stride = sums;
  const std::optional<TensorView>* grads[] = {&dq, &dk, &dv};
  const char* names[] = {"dq", "dk", "dv"};
  for (int which = 0; which < 3; ++which) {
    HeadPart& part = plan.part[which];
    const int64_t first = which == 0 ? 0 : a.heads + (which - 1) * a.kv_heads;
    part.dx = input_heads(d_tokens, first, plan.d);
    if (which < 2)
      part.dweight = static_cast<char*>(d_weights.data) + which * of_q * size_of(d_weights.dtype);
    if (!*grads[which]) continue;
    const TensorView& grad = **grads[which];
    const int64_t joint = grad.ndim == 4 ? grad.shape[layout == HeadLayout::bhld ? 2 : 1] : 0;
    check_output(a, names[which], grad, layout, a.heads_of(which), joint, plan);
    check(0 <= start && start + length <= joint, a.op, ": start must be 0 or more and start + ", length,
          " tokens at most ", joint, ", got ", start);
    part.y = output_heads(grad, layout, start);
  }
  return plan;
}

}  // namespace rfk
