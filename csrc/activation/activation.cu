#include "activation/activation.h"

#include "activation/activation_maps.h"
#include "core/map_vectors.cuh"

namespace rfk {

void activation_cuda(Stream stream, const TensorView& out, const TensorView& x,
                     const std::optional<TensorView>& bias, const std::string& kind,
                     const std::string& tier) {
  run_activation(MapVectorsCuda{cudaStream_t(stream), x.device.index}, out, x, bias, kind, tier);
}

void activation_backward_cuda(Stream stream, const TensorView& out, const TensorView& grad,
                              const TensorView& x, const std::optional<TensorView>& bias,
                              const std::string& kind) {
  run_activation_backward(MapVectorsCuda{cudaStream_t(stream), x.device.index}, out, grad, x, bias, kind);
}

}  // namespace rfk
