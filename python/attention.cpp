#include "attention/attention.h"

#include "rooms.h"

namespace rfk::python {

void bind_attention(py::module_& m) {
  def(m, "attention", &attention);
  def(m, "attention_merge", &attention_merge);
  m.def("attention_workspace",
        [](const TensorArg& q, const TensorArg& k, const std::optional<TensorArg>& q_starts,
           const std::string& precision) {
          using View = Passed<std::optional<TensorView>>;
          return attention_workspace(q.view, k.view, View::unwrap(q_starts), precision);
        });
}

}  // namespace rfk::python
