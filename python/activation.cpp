#include "activation/activation.h"

#include "rooms.h"

namespace rfk::python {

void bind_activation(py::module_& m) {
  def(m, "activation", &activation);
  def(m, "activation_backward", &activation_backward);
  def(m, "gated_activation", &gated_activation);
  def(m, "gated_activation_backward", &gated_activation_backward);
}

}  // namespace rfk::python
