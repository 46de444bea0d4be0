#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "core/tensor.h"

namespace rfk {

// Thrown for every misuse that a caller can cause; the bindings turn it into ValueError.
struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <typename... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream os;
  (os << ... << parts);
  throw Error(os.str());
}

template <typename... Parts> void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

// Every tensor must be contiguous, and on the device of `first`.
void check_dense(const char* op, const TensorView& first, std::initializer_list<const TensorView*> others);

// An elementwise kernel may write over one of its inputs, but not across the edge of one.
void check_no_partial_overlap(const char* op, const TensorView& out, const TensorView& input);

// Two results of a call share no memory.
void check_apart(const char* op, const TensorView& a, const TensorView& b);

}  // namespace rfk
