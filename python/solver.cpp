#include "solver/solver.h"

#include "rooms.h"

namespace rfk::python {

void bind_solver(py::module_& m) {
  def(m, "affine_step", &affine_step);
  def(m, "combine", &combine);
  m.def("combine_workspace", [](const TensorArg& x) { return combine_workspace(x.view); });
  def(m, "linear_combination", &linear_combination);
  def(m, "moments", &moments);
  def(m, "stochastic_step", &stochastic_step);
  def(m, "taylor_step", &taylor_step);
}

}  // namespace rfk::python
