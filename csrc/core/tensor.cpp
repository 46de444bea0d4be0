#include "core/tensor.h"

#include <algorithm>
#include <ostream>

#include "core/check.h"

namespace rfk {

int64_t TensorView::numel() const {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

bool TensorView::is_contiguous() const {
  if (numel() == 0) return true;
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && stride[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

bool TensorView::has_shape(std::initializer_list<int64_t> dims) const {
  return std::equal(shape, shape + ndim, dims.begin(), dims.end());
}

TensorView TensorView::slice(int64_t i) const {
  check(ndim >= 1, "slice: expected at least one dimension, got ", *this);
  TensorView t = *this;
  t.ndim = ndim - 1;
  std::copy(shape + 1, shape + ndim, t.shape);
  std::copy(stride + 1, stride + ndim, t.stride);
  t.data = static_cast<char*>(data) + i * stride[0] * size_of(dtype);
  return t;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return std::equal(a.shape, a.shape + a.ndim, b.shape, b.shape + b.ndim);
}

bool same_type(const TensorView& a, const TensorView& b) { return a.dtype == b.dtype && same_shape(a, b); }

std::ostream& operator<<(std::ostream& os, const TensorView& t) {
  os << name_of(t.dtype) << '[';
  for (int i = 0; i < t.ndim; ++i) os << (i ? ", " : "") << t.shape[i];
  os << "] ";
  return t.device.type == DeviceType::cpu ? os << "cpu" : os << "cuda:" << t.device.index;
}

void check_dense(const char* op, const TensorView& first, std::initializer_list<const TensorView*> others) {
  const auto dense = [&](const TensorView& t) {
    check(t.is_contiguous(), op, ": expected contiguous tensors, got ", t, " with gaps between its elements");
  };
  dense(first);
  for (const TensorView* t : others) {
    check(t->device == first.device, op, ": expected all tensors on one device, got ", first, " and ", *t);
    dense(*t);
  }
}

void check_no_partial_overlap(const char* op, const TensorView& out, const TensorView& input) {
  const auto begin = [](const TensorView& t) { return static_cast<const char*>(t.data); };
  const auto end = [&](const TensorView& t) {
    int64_t last = 0;
    for (int d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.stride[d];
    return begin(t) + (t.numel() ? last + 1 : 0) * size_of(t.dtype);
  };
  const bool same = out.data == input.data && same_type(out, input) &&
                    (std::equal(out.stride, out.stride + out.ndim, input.stride) ||
                     (out.is_contiguous() && input.is_contiguous()));
  check(same || end(out) <= begin(input) || end(input) <= begin(out), op,
        ": out must be one of the inputs or share no memory with them, got out ", out, " across ", input);
}

}  // namespace rfk
