#include "noise/noise.h"

#include "rooms.h"

namespace rfk::python {

void bind_noise(py::module_& m) {
  def(m, "philox_normal", &philox_normal);
  def(m, "renoise", &renoise);
  def(m, "stochastic_round", &stochastic_round);
}

}  // namespace rfk::python
