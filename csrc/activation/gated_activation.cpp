#include "activation/activation.h"
#include "activation/activation_maps.h"
#include "activation/check_activation.h"
#include "core/backend.h"
#include "core/map_vectors_cpu.h"

namespace rfk {
namespace {

void check_overlap(const char* op, const TensorView& out, const GateAndUp& in) {
  check_no_partial_overlap(op, out, in.gate);
  check_no_partial_overlap(op, out, in.up);
}

}  // namespace

void gated_activation(Stream stream, const TensorView& out, const TensorView& x,
                      const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
                      const std::optional<TensorView>& up_bias, const std::string& kind, bool gate_first,
                      const std::string& tier) {
  const char* op = "gated_activation";
  const TensorView half = check_gate_and_up(op, x, up, bias, up_bias, kind, tier);
  check(same_type(out, half), op, ": out must be like one half ", half, ", got ", out);
  check_overlap(op, out, {x, up, gate_first});
  if (out.numel() == 0) return;

  if (x.device.type == DeviceType::cpu)
    return run_gated_activation(MapVectorsCpu{}, out, x, up, bias, up_bias, kind, gate_first, tier);
  if constexpr (kWithCuda)
    return gated_activation_cuda(stream, out, x, up, bias, up_bias, kind, gate_first, tier);
  fail_without_cuda(op);
}

void gated_activation_backward(Stream stream, const TensorView& out, const TensorView& grad,
                               const TensorView& x, const std::optional<TensorView>& up,
                               const std::optional<TensorView>& bias,
                               const std::optional<TensorView>& up_bias, const std::string& kind,
                               bool gate_first) {
  const char* op = "gated_activation_backward";
  const TensorView half = check_gate_and_up(op, x, up, bias, up_bias, kind, "fast");
  check(same_type(grad, half), op, ": grad must be like one half ", half, ", got ", grad);
  TensorView packed = half;
  packed.shape[half.ndim - 1] *= 2;
  check(same_type(out, packed), op, ": out must be like both halves ", packed, ", got ", out);
  check_no_partial_overlap(op, out, grad);
  check_no_partial_overlap(op, out, x);
  if (up) check_no_partial_overlap(op, out, *up);
  if (out.numel() == 0) return;

  if (x.device.type == DeviceType::cpu)
    return run_gated_activation_backward(MapVectorsCpu{}, out, grad, x, up, bias, up_bias, kind, gate_first);
  if constexpr (kWithCuda)
    return gated_activation_backward_cuda(stream, out, grad, x, up, bias, up_bias, kind, gate_first);
  fail_without_cuda(op);
}

}  // namespace rfk
