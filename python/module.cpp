#include <pybind11/pybind11.h>

#include "core/build_info.h"
#include "core/tiles.h"
#include "rooms.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const rfk::BuildInfo info = rfk::build_info();
  py::dict features;
  for (const auto& [name, present] : info.cpu_features) features[py::str(name)] = present;
  py::dict d;
  d["version"] = info.version;
  d["compiler"] = info.compiler;
  d["cuda"] = info.cuda.empty() ? py::object(py::none()) : py::object(py::str(info.cuda));
  d["cuda_archs"] = info.cuda_archs;
  d["cpu_features"] = features;
  d["cpu_isa"] = info.cpu_isa;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The kernels of rfkernels. Call them through rfkernels.ops.";
  m.def("build_info", &build_info, "What the library was built for and what this CPU offers.");
  m.def("limit_instructions", &rfk::limit_instructions);
  m.def("use_exchange_api", &rfk::python::use_exchange_api, "Off: read every tensor through __dlpack__.");
  rfk::python::bind_activation(m);
  rfk::python::bind_attention(m);
  rfk::python::bind_embedding(m);
  rfk::python::bind_guidance(m);
  rfk::python::bind_linear(m);
  rfk::python::bind_moe(m);
  rfk::python::bind_noise(m);
  rfk::python::bind_norm(m);
  rfk::python::bind_rope(m);
  rfk::python::bind_solver(m);
}
