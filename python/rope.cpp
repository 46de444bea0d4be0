#include "rope/rope.h"

#include "rooms.h"

namespace rfk::python {

void bind_rope(py::module_& m) {
  def(m, "qkv_norm_rope", &qkv_norm_rope);
  def(m, "qkv_norm_rope_backward", &qkv_norm_rope_backward);
}

}  // namespace rfk::python
