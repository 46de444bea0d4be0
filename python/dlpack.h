#pragma once

#include <pybind11/pybind11.h>

#include "core/tensor.h"
#include "dlpack_abi.h"

// Lets a bound function take tensors: any Python object with __dlpack__ (torch, numpy, jax, cupy)
// converts to a view of its memory.

namespace rfk::python {

struct TensorArg {
  TensorView view;
  const dlpack::ExchangeApi* api = nullptr;  // the framework's C functions, null where it has none
  pybind11::object owner;                    // keeps an exported view alive
};

// Reads `tensor` into `arg`; false if it is no tensor at all.
bool read_tensor(pybind11::handle tensor, TensorArg& arg);

// The stream that the framework of `arg` is working on, on the device of `arg`.
Stream stream_of(const TensorArg& arg);

// Off: every tensor goes through __dlpack__, as with frameworks older than the C table (tests).
void use_exchange_api(bool on);

}  // namespace rfk::python

namespace pybind11::detail {

template <> struct type_caster<rfk::python::TensorArg> {
  PYBIND11_TYPE_CASTER(rfk::python::TensorArg, const_name("Tensor"));
  bool load(handle src, bool) { return rfk::python::read_tensor(src, value); }
};

}  // namespace pybind11::detail
