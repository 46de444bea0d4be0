#include "activation/activation.h"
#include "activation/activation_maps.h"
#include "core/map_vectors.cuh"

namespace rfk {

void gated_activation_cuda(Stream stream, const TensorView& out, const TensorView& x,
                           const std::optional<TensorView>& up, const std::optional<TensorView>& bias,
                           const std::optional<TensorView>& up_bias, const std::string& kind, bool gate_first,
                           const std::string& tier) {
  run_gated_activation(MapVectorsCuda{cudaStream_t(stream), x.device.index}, out, x, up, bias, up_bias, kind,
                       gate_first, tier);
}

void gated_activation_backward_cuda(Stream stream, const TensorView& out, const TensorView& grad,
                                    const TensorView& x, const std::optional<TensorView>& up,
                                    const std::optional<TensorView>& bias,
                                    const std::optional<TensorView>& up_bias, const std::string& kind,
                                    bool gate_first) {
  run_gated_activation_backward(MapVectorsCuda{cudaStream_t(stream), x.device.index}, out, grad, x, up, bias,
                                up_bias, kind, gate_first);
}

}  // namespace rfk
