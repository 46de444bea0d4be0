#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "dlpack.h"

namespace rfk::python {

namespace py = pybind11;

// What Python passes for a kernel's parameter, and the parameter made of it.
template <typename T> struct Passed {
  using type = T;
  static const T& unwrap(const T& v) { return v; }
};
template <> struct Passed<TensorView> {
  using type = TensorArg;
  static const TensorView& unwrap(const TensorArg& arg) { return arg.view; }
};
template <> struct Passed<std::optional<TensorView>> {
  using type = std::optional<TensorArg>;
  static std::optional<TensorView> unwrap(const std::optional<TensorArg>& arg) {
    return arg ? std::optional(arg->view) : std::nullopt;
  }
};
template <> struct Passed<std::vector<TensorView>> {
  using type = std::vector<TensorArg>;
  static std::vector<TensorView> unwrap(const std::vector<TensorArg>& args) {
    std::vector<TensorView> views;
    for (const TensorArg& arg : args) views.push_back(arg.view);
    return views;
  }
};

// Binds a kernel f(stream, out, inputs...). Python passes anything with __dlpack__; the stream is
// the one that the framework of `out` works on. The GIL is released while f runs: a kernel touches
// no Python object.
template <typename... Args>
void def(py::module_& m, const char* name, void (*f)(Stream, const TensorView&, Args...)) {
  m.def(name, [f](const TensorArg& out, const typename Passed<std::decay_t<Args>>::type&... args) {
    const Stream stream = stream_of(out);
    py::gil_scoped_release release;
    f(stream, out.view, Passed<std::decay_t<Args>>::unwrap(args)...);
  });
}

// One function per room of csrc/, defined in the file of the same name.
void bind_activation(py::module_& m);
void bind_attention(py::module_& m);
void bind_embedding(py::module_& m);
void bind_guidance(py::module_& m);
void bind_linear(py::module_& m);
void bind_moe(py::module_& m);
void bind_noise(py::module_& m);
void bind_norm(py::module_& m);
void bind_rope(py::module_& m);
void bind_solver(py::module_& m);

}  // namespace rfk::python
