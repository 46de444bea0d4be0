#include "guidance/guidance.h"

#include "rooms.h"

namespace rfk::python {

void bind_guidance(py::module_& m) { def(m, "cfg_step", &cfg_step); }

}  // namespace rfk::python
