#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/rows.h"

// map_vectors: out_0[r, c], ..., out_{m-1}[r, c] = f(in_0[r, c], ..., in_{n-1}[r, c]; p_0[c], ...,
// p_{k-1}[c])
//
// The elementwise loop over rows with strides, the results of plan_vectors. An op is a struct that holds the
// maths:
//
//   static constexpr int kInputs, kParams, kOutputs;
//   void operator()(const A (&in)[kInputs], const A (&param)[kParams], A (&out)[kOutputs]) const;
//
// with A = acc_t<T>. MapVectorsCpu (map_vectors_cpu.h) and MapVectorsCuda (map_vectors.cuh) take the same op.
// A result may be one of the inputs.

namespace rfk {

// One number per column, of dtype T or float. Absent (null) it reads as -0, which added to x leaves x, even
// -0.
struct ColumnParam {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

template <typename T, typename Op> struct Vectors {
  RowVectors<const T> in[Op::kInputs];
  ColumnParam param[Op::kParams];
  RowVectors<T> out[Op::kOutputs];
};

}  // namespace rfk
