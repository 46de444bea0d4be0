#include "moe/grouped_linear.h"

#include "core/backend.h"

namespace rfk {
namespace {

constexpr const char* kOp = "grouped_linear";

bool is_rows(const TensorView& t) { return t.ndim == 2 && (t.shape[1] <= 1 || t.stride[1] == 1); }

void check_list(const GroupedCall& c, const char* name, const std::vector<TensorView>& list, bool matrices) {
  check(int(list.size()) == c.experts(), kOp, ": expected a tensor of ", name, " for each of ", c.experts(),
        " experts, got ", list.size());
  for (const TensorView& t : list) {
    const bool fits = matrices ? t.has_shape({c.n(), c.k()}) : t.has_shape({c.n()});
    check(t.dtype == c.x.dtype && fits && t.is_contiguous() && t.device == c.x.device, kOp, ": ", name,
          " must be contiguous [", c.n(), matrices ? ", " + std::to_string(c.k()) : "", "] like x ", c.x,
          ", got ", t);
  }
}

void check_tensors(const GroupedCall& c) {
  check(is_rows(c.x) && is_floating(c.x.dtype) && c.x.shape[1] >= 1, kOp,
        ": x must be floating [rows, in], adjacent along the last axis, got ", c.x);
  check(1 <= c.experts() && c.experts() <= kMaxExperts, kOp, ": expected weights of 1..", kMaxExperts,
        " experts, got ", c.experts());
  check(c.weights[0].ndim == 2 && c.n() >= 1, kOp, ": weights must be [out, in], got ", c.weights[0]);
  check_list(c, "weights", c.weights, true);
  if (c.gated()) check_list(c, "up", c.up, true);
  if (!c.bias.empty()) check_list(c, "bias", c.bias, false);
  if (!c.up_bias.empty()) check_list(c, "up_bias", c.up_bias, false);
  check(c.gated() || c.up_bias.empty(), kOp, ": up_bias needs up");
  check(c.offsets.dtype == DType::i32 && c.offsets.has_shape({c.experts() + 1}) &&
            c.offsets.is_contiguous() && c.offsets.device == c.x.device,
        kOp, ": offsets must be i32[", c.experts() + 1, "], where each expert begins and the last ends, got ",
        c.offsets);
  check(!c.index || (c.index->dtype == DType::i32 && c.index->ndim == 1 && c.index->is_contiguous() &&
                     c.index->device == c.x.device),
        kOp, ": index must be contiguous i32[slots], got ", c.index);
  const int64_t slots = c.index ? c.index->shape[0] : c.x.shape[0];
  check(c.out.dtype == c.x.dtype && c.out.has_shape({slots, c.n()}) && is_rows(c.out) &&
            c.out.device == c.x.device,
        kOp, ": out must be ", name_of(c.x.dtype), "[", slots, ", ", c.n(), "], got ", c.out);
  check_apart(kOp, c.out, c.x);
}

}  // namespace

void grouped_linear(Stream stream, const TensorView& out, const TensorView& x,
                    const std::vector<TensorView>& weights, const TensorView& offsets, const Optional& index,
                    const std::vector<TensorView>& up, const std::vector<TensorView>& bias,
                    const std::vector<TensorView>& up_bias, const Optional& workspace) {
  const GroupedCall call{out, x, weights, up, bias, up_bias, offsets, index, workspace};
  check_tensors(call);
  if (call.slots() == 0) return;
  if (x.device.type == DeviceType::cpu) return grouped_linear_cpu(call);
  if constexpr (kWithCuda) return grouped_linear_cuda(stream, call);
  fail_without_cuda(kOp);
}

}  // namespace rfk
