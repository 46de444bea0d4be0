#include "core/tensor.h"

#include <algorithm>
#include <numeric>
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

namespace {

struct Extent {
  const char *begin, *end;
  int64_t width;     // bytes of neighbours along the last axis
  int64_t step = 0;  // the bytes between two runs of neighbours are a multiple of it

  explicit Extent(const TensorView& t) : begin(static_cast<const char*>(t.data)), end(begin), width(0) {
    if (t.numel() == 0) return;
    const int64_t size = size_of(t.dtype);
    int64_t last = 0;
    for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i] * size;
    end += last + size;
    const bool runs = t.ndim > 0 && t.stride[t.ndim - 1] == 1;
    width = runs ? t.shape[t.ndim - 1] * size : size;
    for (int i = 0; i < t.ndim - runs; ++i)
      if (t.shape[i] > 1) step = std::gcd(step, t.stride[i] * size);
  }

  // They share no byte: one ends before the other, or they are columns of one table.
  bool apart(const Extent& other) const {
    if (end <= other.begin || other.end <= begin) return true;
    const int64_t common = std::gcd(step, other.step);
    if (common == 0) return false;
    const int64_t ahead = ((other.begin - begin) % common + common) % common;
    return ahead >= width && ahead + other.width <= common;
  }
};

bool same_elements(const TensorView& a, const TensorView& b) {
  bool same = a.data == b.data && same_type(a, b);
  for (int i = 0; same && i < a.ndim; ++i) same = a.shape[i] == 1 || a.stride[i] == b.stride[i];
  return same;
}

}  // namespace

void check_no_partial_overlap(const char* op, const TensorView& out, const TensorView& input) {
  check(same_elements(out, input) || Extent(out).apart(Extent(input)), op,
        ": out must be one of the inputs or share no memory with them, got out ", out, " across ", input);
}

void check_apart(const char* op, const TensorView& a, const TensorView& b) {
  check(Extent(a).apart(Extent(b)), op, ": expected results that share no memory, got ", a, " and ", b);
}

std::ostream& operator<<(std::ostream& os, const std::optional<TensorView>& t) {
  return t ? os << *t : os << "none";
}

}  // namespace rfk
