#include "dlpack.h"

#include "core/check.h"

namespace py = pybind11;

namespace rfk::python {
namespace {

bool exchange_api_on = true;

DType dtype_of(dlpack::DataType t) {
  if (t.lanes == 1) {
    if (t.code == dlpack::kFloat && t.bits == 64) return DType::f64;
    if (t.code == dlpack::kFloat && t.bits == 32) return DType::f32;
    if (t.code == dlpack::kFloat && t.bits == 16) return DType::f16;
    if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bf16;
    if (t.code == dlpack::kInt && t.bits == 64) return DType::i64;
    if (t.code == dlpack::kInt && t.bits == 32) return DType::i32;
    if (t.code == dlpack::kInt && t.bits == 8) return DType::i8;
    if (t.code == dlpack::kUInt && t.bits == 8) return DType::u8;
  }
  fail("expected float64, float32, float16, bfloat16, int64, int32, int8 or uint8, got DLPack type code ",
       int(t.code), ", ", int(t.bits), " bits, ", t.lanes, " lanes");
}

Device device_of(dlpack::Device d) {
  if (d.type == dlpack::kCpu || d.type == dlpack::kCudaHost) return {DeviceType::cpu, 0};
  if (d.type == dlpack::kCuda || d.type == dlpack::kCudaManaged) return {DeviceType::cuda, d.id};
  fail("expected a tensor on the CPU or a CUDA device, got DLPack device type ", d.type);
}

TensorView view_of(const dlpack::Tensor& t) {
  check(t.ndim <= kMaxDims, "expected at most ", kMaxDims, " dimensions, got ", t.ndim);
  TensorView view{static_cast<char*>(t.data) + t.byte_offset, dtype_of(t.dtype), device_of(t.device), t.ndim};
  int64_t dense = 1;  // a null `strides` means row-major
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.stride[i] = t.strides ? t.strides[i] : dense;
    dense *= t.shape[i];
  }
  return view;
}

// The newest table of major version 1, or null if the type has none.
const dlpack::ExchangeApi* find_exchange_api(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  while (api && api->version.major != 1) api = api->previous;
  return api && api->tensor_from_object ? api : nullptr;
}

const dlpack::ExchangeApi* exchange_api(py::handle tensor) {
  static py::handle known_type;  // one framework per process is the common case; guarded by the GIL
  static const dlpack::ExchangeApi* known_api = nullptr;
  const py::handle type = py::type::handle_of(tensor);
  if (!exchange_api_on) return nullptr;
  if (type.ptr() != known_type.ptr()) {
    known_api = find_exchange_api(type);
    known_type = py::handle(type).inc_ref();  // never freed, so that its address is never reused
  }
  return known_api;
}

}  // namespace

bool read_tensor(py::handle tensor, TensorArg& arg) {
  arg.api = exchange_api(tensor);
  if (arg.api) {
    dlpack::Tensor t;
    if (arg.api->tensor_from_object(tensor.ptr(), &t)) throw py::error_already_set();
    arg.view = view_of(t);
    return true;
  }
  if (!py::hasattr(tensor, "__dlpack__")) return false;
  // torch exports no tensor that requires a gradient; autograd has seen this one already.
  const bool detach = py::hasattr(tensor, "requires_grad") && tensor.attr("requires_grad").cast<bool>();
  const py::object source = detach ? tensor.attr("detach")() : py::reinterpret_borrow<py::object>(tensor);
  py::capsule capsule = source.attr("__dlpack__")();
  arg.view = view_of(capsule.get_pointer<dlpack::ManagedTensor>()->tensor);
  arg.owner = capsule;  // a capsule that nobody consumes frees its tensor itself
  return true;
}

Stream stream_of(const TensorArg& arg) {
  if (arg.view.device.type == DeviceType::cpu) return nullptr;
  if (arg.api) {
    void* stream = nullptr;
    if (arg.api->current_work_stream(dlpack::kCuda, arg.view.device.index, &stream))
      throw py::error_already_set();
    return stream;
  }
  // Without the table: torch's current stream if torch is there; others were exported for the
  // legacy stream, which is what __dlpack__() without arguments means.
  const py::object modules = py::module_::import("sys").attr("modules");
  if (!modules.contains("torch")) return nullptr;
  const py::object current = modules["torch"].attr("cuda").attr("current_stream")(arg.view.device.index);
  return reinterpret_cast<Stream>(current.attr("cuda_stream").cast<uintptr_t>());
}

void use_exchange_api(bool on) { exchange_api_on = on; }

}  // namespace rfk::python
