#include "linear/linear.h"

#include "rooms.h"

namespace rfk::python {

void bind_linear(py::module_& m) {
  def(m, "dequantize_gguf", &dequantize_gguf);
  def(m, "linear", &linear);
  def(m, "linear_gguf", &linear_gguf);
  m.def("linear_workspace",
        [](const TensorArg& x, const TensorArg& weight, const std::optional<TensorArg>& weight_scale,
           const std::optional<TensorArg>& weight_zero, const std::optional<TensorArg>& up) {
          using View = Passed<std::optional<TensorView>>;
          return linear_workspace(x.view, weight.view, View::unwrap(weight_scale), View::unwrap(weight_zero),
                                  View::unwrap(up));
        });
  m.def("linear_roof", &linear_roof, py::call_guard<py::gil_scoped_release>());
}

}  // namespace rfk::python
