#pragma once

#include <utility>

#include "core/check.h"
#include "core/tensor.h"

namespace rfk {

// Calls f.operator()<T>() with the C++ type of a floating `dtype`.
template <typename F> void dispatch_float(const char* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f.template operator()<double>();
    case DType::f32: return f.template operator()<float>();
    case DType::f16: return f.template operator()<f16>();
    case DType::bf16: return f.template operator()<bf16>();
    default: break;
  }
  fail(op, ": expected a floating dtype, got ", name_of(dtype));
}

// Calls f.operator()<T, V>() for a state of type T and velocities of type V: equal types, or
// an f32 state with 16-bit velocities.
template <typename F>
void dispatch_state(const char* op, const TensorView& state, const TensorView& velocity, F&& f) {
  if (state.dtype == velocity.dtype)
    return dispatch_float(op, state.dtype, [&]<typename T>() { f.template operator()<T, T>(); });
  if (state.dtype == DType::f32 && velocity.dtype == DType::bf16) return f.template operator()<float, bf16>();
  if (state.dtype == DType::f32 && velocity.dtype == DType::f16) return f.template operator()<float, f16>();
  fail(op, ": expected one dtype, or f32 first and f16 or bf16 after it, got ", state, " with ", velocity);
}

// Calls f.operator()<N>() with the constant N of Lo..Hi that equals `value`.
template <int Lo, int Hi, typename F> void dispatch_int(int64_t value, F&& f) {
  const bool found = [&]<int... I>(std::integer_sequence<int, I...>) {
    return ((value == Lo + I && (f.template operator()<Lo + I>(), true)) || ...);
  }(std::make_integer_sequence<int, Hi - Lo + 1>());
  check(found, "expected ", Lo, "..", Hi, ", got ", value);
}

}  // namespace rfk
