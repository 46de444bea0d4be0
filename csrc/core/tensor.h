#pragma once

#include <cstdint>
#include <initializer_list>
#include <iosfwd>
#include <optional>

#include "core/dtype.h"

namespace rfk {

enum class DeviceType : uint8_t { cpu, cuda };

struct Device {
  DeviceType type;
  int index;
  bool operator==(const Device&) const = default;
};

using Stream = void*;  // a cudaStream_t; unused for tensors on the CPU

inline constexpr int kMaxDims = 8;

// A borrowed, typed, strided block of memory: what a kernel needs to know of a tensor
// and no more. It owns nothing; whoever made it keeps the memory alive.
struct TensorView {
  void* data;
  DType dtype;
  Device device;
  int ndim;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  int64_t numel() const;
  bool is_contiguous() const;
  bool has_shape(std::initializer_list<int64_t> dims) const;
  TensorView slice(int64_t i) const;  // t[i]

  template <typename T> T* ptr() const { return static_cast<T*>(data); }
};

bool same_shape(const TensorView& a, const TensorView& b);
bool same_type(const TensorView& a, const TensorView& b);  // dtype and shape agree

std::ostream& operator<<(std::ostream&, const TensorView&);                 // "bf16[2, 4096] cuda:0"
std::ostream& operator<<(std::ostream&, const std::optional<TensorView>&);  // or "none"

}  // namespace rfk
