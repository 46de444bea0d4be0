#include "activation/activation.h"

#include "activation/activation_maps.h"
#include "activation/check_activation.h"
#include "core/backend.h"
#include "core/map_vectors_cpu.h"

namespace rfk {

void activation(Stream stream, const TensorView& out, const TensorView& x,
                const std::optional<TensorView>& bias, const std::string& kind, const std::string& tier) {
  const char* op = "activation";
  check_tokens(op, "x", x);
  check(same_type(out, x), op, ": out must be like x ", x, ", got ", out);
  check_bias(op, "bias", bias, x, x.shape[x.ndim - 1]);
  check_names(op, kind, tier);
  check_no_partial_overlap(op, out, x);
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu) return run_activation(MapVectorsCpu{}, out, x, bias, kind, tier);
  if constexpr (kWithCuda) return activation_cuda(stream, out, x, bias, kind, tier);
  fail_without_cuda(op);
}

void activation_backward(Stream stream, const TensorView& out, const TensorView& grad, const TensorView& x,
                         const std::optional<TensorView>& bias, const std::string& kind) {
  const char* op = "activation_backward";
  check_tokens(op, "x", x);
  check(same_type(out, x), op, ": out must be like x ", x, ", got ", out);
  check(same_type(grad, x), op, ": grad must be like x ", x, ", got ", grad);
  check_bias(op, "bias", bias, x, x.shape[x.ndim - 1]);
  check_names(op, kind, "fast");
  check_no_partial_overlap(op, out, grad);
  check_no_partial_overlap(op, out, x);
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu)
    return run_activation_backward(MapVectorsCpu{}, out, grad, x, bias, kind);
  if constexpr (kWithCuda) return activation_backward_cuda(stream, out, grad, x, bias, kind);
  fail_without_cuda(op);
}

}  // namespace rfk
