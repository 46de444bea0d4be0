#include "norm/norm.h"

#include <cmath>

#include "core/backend.h"
#include "norm/call.h"

namespace rfk {
namespace {

struct Named {
  const char* name;
  const Optional& view;
};

void check_results(const AdaNormCall& c) {
  const TensorView& x = c.x;
  for (const auto& [name, view] : {Named{"x_out", c.x_out}, Named{"out", c.out}, Named{"y", c.y}})
    check(!view || same_type(*view, x), c.op, ": ", name, " must be like x ", x, ", got ", view);
  for (const Optional* out : {&c.x_out, &c.out, &c.codes}) {
    if (!*out) continue;
    check_no_partial_overlap(c.op, **out, x);
    if (c.y) check_no_partial_overlap(c.op, **out, *c.y);
  }
  if (c.x_out && c.out) check_apart(c.op, *c.x_out, *c.out);
}

void check_codes(const AdaNormCall& c) {
  const TensorView &x = c.x, &codes = *c.codes;
  check((codes.dtype == DType::i8 || codes.dtype == DType::u8) && same_shape(codes, x), c.op,
        ": codes must be i8 or u8 in the shape of x ", x, ", got ", codes);
  const Optional& given = c.tensor_scale;
  check(!given || (codes.dtype == DType::u8 && given->dtype == DType::f32 && given->numel() == 1 &&
                   given->device == x.device),
        c.op, ": tensor_scale must be one f32 number on the device of x, with e4m3 codes; got ", given,
        " with codes ", codes);
  TensorView rows = x;
  rows.ndim = x.ndim - 1;
  check(c.scales && c.scales->dtype == DType::f32 && (given || same_shape(*c.scales, rows)), c.op,
        ": scales must be f32, one for each row of x ", x, ", got ", c.scales);
  const int64_t g = c.rotation, width = x.shape[x.ndim - 1];
  check(g == 0 || ((g == 16 || g == 64 || g == 256) && width % g == 0), c.op,
        ": rotation must be 0, 16, 64 or 256 and divide the width, got ", g, " for x ", x);
}

void check_parameters(const AdaNormCall& c) {
  const int64_t width = c.x.shape[c.x.ndim - 1];
  const DType dtype = parameter_dtype(c);
  for (const auto& [name, view] :
       {Named{"weight", c.weight}, Named{"bias", c.bias}, Named{"branch_weight", c.branch_weight}})
    check(!view || (view->dtype == dtype && view->device == c.x.device && view->has_shape({width}) &&
                    view->is_contiguous()),
          c.op, ": ", name, " must be ", name_of(dtype), "[", width, "] on the device of x, got ", view);
  for (const auto& [name, view] : {Named{"scale", c.scale}, Named{"shift", c.shift}, Named{"gate", c.gate}}) {
    if (!view) continue;
    check(view->dtype == dtype && view->ndim >= 1 && view->shape[view->ndim - 1] == width, c.op, ": ", name,
          " must be ", name_of(dtype), " with a last axis of ", width, " as x ", c.x, ", got ", view);
    check(!c.index || (view->ndim == 2 && view->device == c.x.device && (width <= 1 || view->stride[1] == 1)),
          c.op, ": ", name, " must be [groups, ", width, "] on the device of x where an index is given, got ",
          view);
  }
}

void check_index(const AdaNormCall& c) {
  check(c.index->dtype == DType::i64 || c.index->dtype == DType::i32, c.op,
        ": index must be i64 or i32, got ", c.index);
  const Optional* first = nullptr;
  for (const Optional* table : {&c.scale, &c.shift, &c.gate}) {
    if (!*table) continue;
    if (!first) first = table;
    check((*table)->shape[0] == (*first)->shape[0], c.op, ": expected tables of as many rows, got ", *first,
          " and ", *table);
  }
  check(first, c.op, ": index needs a scale, a shift or a gate to select from");
}

void run(Stream stream, const AdaNormCall& c) {
  check(c.x.ndim >= 1, c.op, ": expected x [*lead, width], got ", c.x);
  check(std::isfinite(c.eps) && c.eps >= 0, c.op, ": eps must be finite and not negative, got ", c.eps);
  check_results(c);
  check_parameters(c);
  if (c.codes) check_codes(c);
  if (c.index) check_index(c);
  if (c.x.device.type == DeviceType::cpu) return ada_norm_cpu(c);
  if constexpr (kWithCuda) return ada_norm_cuda(stream, c);
  fail_without_cuda(c.op);
}

}  // namespace

void norm_modulate(Stream stream, const TensorView& out, const TensorView& x, const Optional& scale,
                   const Optional& shift, const Optional& index, const Optional& weight, const Optional& bias,
                   const std::string& norm, double eps, const std::string& tier) {
  AdaNormCall c = norm_modulate_call("norm_modulate", x, scale, shift, index, weight, bias, norm, eps, tier);
  c.out = out;
  run(stream, c);
}

void gated_residual(Stream stream, const TensorView& x_out, const TensorView& x, const TensorView& y,
                    const Optional& gate, const Optional& index, const std::string& gate_activation,
                    const std::string& branch_norm, const Optional& branch_weight, double eps,
                    const std::string& tier) {
  AdaNormCall c = norm_modulate_call("gated_residual", x, {}, {}, index, {}, {}, "none", eps, tier);
  add_residual(c, x_out, y, gate, gate_activation, branch_norm, branch_weight);
  run(stream, c);
}

void gated_residual_norm_modulate(Stream stream, const TensorView& x_out, const TensorView& out,
                                  const TensorView& x, const TensorView& y, const Optional& gate,
                                  const Optional& scale, const Optional& shift, const Optional& index,
                                  const std::string& gate_activation, const std::string& branch_norm,
                                  const Optional& branch_weight, const Optional& weight, const Optional& bias,
                                  const std::string& norm, double eps, const std::string& tier) {
  AdaNormCall c = norm_modulate_call("gated_residual_norm_modulate", x, scale, shift, index, weight, bias,
                                     norm, eps, tier);
  add_residual(c, x_out, y, gate, gate_activation, branch_norm, branch_weight);
  c.out = out;
  run(stream, c);
}

void norm_modulate_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                            const TensorView& x, const Optional& scale, const Optional& shift,
                            const Optional& index, const Optional& weight, const Optional& bias,
                            const std::string& norm, double eps, const std::string& tier,
                            const Optional& tensor_scale, int64_t rotation) {
  AdaNormCall c =
      norm_modulate_call("norm_modulate_quantize", x, scale, shift, index, weight, bias, norm, eps, tier);
  add_codes(c, codes, scales, tensor_scale, rotation);
  run(stream, c);
}

void gated_residual_norm_modulate_quantize(Stream stream, const TensorView& x_out, const TensorView& codes,
                                           const TensorView& scales, const TensorView& x, const TensorView& y,
                                           const Optional& gate, const Optional& scale, const Optional& shift,
                                           const Optional& index, const std::string& gate_activation,
                                           const std::string& branch_norm, const Optional& branch_weight,
                                           const Optional& weight, const Optional& bias,
                                           const std::string& norm, double eps, const std::string& tier,
                                           const Optional& tensor_scale, int64_t rotation) {
  AdaNormCall c = norm_modulate_call("gated_residual_norm_modulate_quantize", x, scale, shift, index, weight,
                                     bias, norm, eps, tier);
  add_residual(c, x_out, y, gate, gate_activation, branch_norm, branch_weight);
  add_codes(c, codes, scales, tensor_scale, rotation);
  run(stream, c);
}

}  // namespace rfk
