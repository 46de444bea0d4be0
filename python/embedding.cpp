#include "embedding/embedding.h"

#include "rooms.h"

namespace rfk::python {

void bind_embedding(py::module_& m) { def(m, "timestep_embedding", &timestep_embedding); }

}  // namespace rfk::python
