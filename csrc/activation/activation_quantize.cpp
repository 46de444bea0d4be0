#include "activation/activation_quantize.h"

#include "activation/activation.h"
#include "activation/check_activation.h"
#include "core/backend.h"
#include "core/quantize_vectors_cpu.h"

namespace rfk {
namespace {

void run_cpu(const ActivationQuantizeCall& c) {
  const QuantizePlan p = plan_quantize(c);
  dispatch_tier(c.op, c.x.dtype, c.kind, c.tier, [&]<typename T, typename K, bool Exact>() {
    with_vectors<T>(
        c, p, Activate<T, K, Exact>(), GatedActivate<T, K, Exact>(),
        [&](const auto& vectors, auto op) { QuantizeVectorsCpu{p.quantized, Exact}(p.plan, vectors, op); });
  });
}

void check_call(const ActivationQuantizeCall& c) {
  TensorView tokens = c.x;
  if (c.gated) {
    tokens = check_gate_and_up(c.op, c.x, c.up, c.bias, c.up_bias, c.kind, c.tier);
  } else {
    check_tokens(c.op, "x", c.x);
    check_bias(c.op, "bias", c.bias, c.x, c.x.shape[c.x.ndim - 1]);
    check_names(c.op, c.kind, c.tier);
  }
  check_codes(c.op, c.codes, c.scales, tokens, c.tensor_scale, c.rotation);
}

void run(Stream stream, const ActivationQuantizeCall& c) {
  check_call(c);
  if (c.codes.numel() == 0) return;
  if (c.x.device.type == DeviceType::cpu) return run_cpu(c);
  if constexpr (kWithCuda) return activation_quantize_call_cuda(stream, c);
  fail_without_cuda(c.op);
}

}  // namespace

void activation_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                         const TensorView& x, const std::optional<TensorView>& bias, const std::string& kind,
                         const std::string& tier, const std::optional<TensorView>& tensor_scale,
                         int64_t rotation) {
  run(stream, activation_quantize_call(codes, scales, x, bias, kind, tier, tensor_scale, rotation));
}

void gated_activation_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                               const TensorView& x, const std::optional<TensorView>& up,
                               const std::optional<TensorView>& bias,
                               const std::optional<TensorView>& up_bias, const std::string& kind,
                               bool gate_first, const std::string& tier,
                               const std::optional<TensorView>& tensor_scale, int64_t rotation) {
  run(stream, gated_activation_quantize_call(codes, scales, x, up, bias, up_bias, kind, gate_first, tier,
                                             tensor_scale, rotation));
}

}  // namespace rfk
