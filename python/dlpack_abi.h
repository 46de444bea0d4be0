#pragma once

#include <cstddef>
#include <cstdint>

// The part of the DLPack 1.3 ABI that the bindings read, declared from its published layout so
// that no header of any framework is needed. tests/test_bindings.py compares it with torch's own.

namespace rfk::python::dlpack {

enum DeviceCode : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type;
  int32_t id;
};
struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ManagedTensor {  // behind a capsule named "dltensor"
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};
struct Version {
  uint32_t major;
  uint32_t minor;
};
struct ExchangeApi {  // behind the capsule type(x).__dlpack_c_exchange_api__
  Version version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && offsetof(Tensor, ndim) == 16 &&
                                     offsetof(Tensor, dtype) == 20 && offsetof(Tensor, shape) == 24 &&
                                     offsetof(Tensor, strides) == 32 && offsetof(Tensor, byte_offset) == 40));
static_assert(sizeof(void*) != 8 || (sizeof(ManagedTensor) == 64 && sizeof(ExchangeApi) == 56 &&
                                     offsetof(ExchangeApi, tensor_from_object) == 40 &&
                                     offsetof(ExchangeApi, current_work_stream) == 48));

}  // namespace rfk::python::dlpack
