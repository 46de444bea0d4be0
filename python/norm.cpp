#include "norm/norm.h"

#include "rooms.h"

namespace rfk::python {

void bind_norm(py::module_& m) {
  def(m, "ada_norm_backward", &ada_norm_backward);
  def(m, "norm_modulate", &norm_modulate);
  def(m, "gated_residual", &gated_residual);
  def(m, "gated_residual_norm_modulate", &gated_residual_norm_modulate);
  def(m, "norm_modulate_quantize", &norm_modulate_quantize);
  def(m, "gated_residual_norm_modulate_quantize", &gated_residual_norm_modulate_quantize);
}

}  // namespace rfk::python
