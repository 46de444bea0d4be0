#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/rows.h"

// map_rows: out[r, c] = f_r(in_0[r, c], ..., in_{n-1}[r, c]) over a [rows, cols] problem.
//
// The one elementwise loop of the library. An op is a struct that holds the maths:
//
//   static constexpr int kInputs;                  how many arrays it reads
//   struct Row { A operator()(const A (&v)[kInputs]) const; };
//   Row row(RowIndex r) const;                     loads what is constant along row r
//
// with A = acc_t<T>. MapRowsCpu (map_rows_cpu.h) and MapRowsCuda (map_rows.cuh) take
// the same op, so the maths is written once and a back end owns only its loop.
// `out` may be any of the inputs.

namespace rfk {

// The first input and the result have type T, the others V (f32 state, bf16 velocities).
template <typename T, typename V, int N> struct Inputs {
  const T* first;
  const V* rest[N > 1 ? N - 1 : 1] = {};
};

}  // namespace rfk
