#include "moe/moe.h"

#include "rooms.h"

namespace rfk::python {

void bind_moe(py::module_& m) {
  def(m, "moe_route", &moe_route);
  def(m, "grouped_linear", &grouped_linear);
  m.def("grouped_linear_workspace", [](const TensorArg& x, const std::vector<TensorArg>& weights,
                                       int64_t slots, bool gated) {
    return grouped_linear_workspace(x.view, Passed<std::vector<TensorView>>::unwrap(weights), slots, gated);
  });
  def(m, "moe_combine", &moe_combine);
}

}  // namespace rfk::python
