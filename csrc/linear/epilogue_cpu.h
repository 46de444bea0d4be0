#pragma once

#include "core/dispatch.h"
#include "core/pack.h"
#include "linear/call.h"

// What follows the sums of a tile on the CPU: passes over [rows, columns] numbers in the first cache. All
// columns of a tile are computed, those that exist are stored.

namespace rfk {

template <int C, typename A> RFK_SIMD void scale_rows(A* tile, int rows, const float* scale) {
  for (int r = 0; r < rows; ++r)
#pragma omp simd
    for (int c = 0; c < C; ++c) tile[r * C + c] *= A(scale[r]);
}

// tile = act(tile + bias)
template <Epilogue kKind, int C, typename A> RFK_SIMD void activate_tile(A* tile, int rows, const A* bias) {
  for (int r = 0; r < rows; ++r)
#pragma omp simd
    for (int c = 0; c < C; ++c) tile[r * C + c] = apply(kKind, tile[r * C + c] + bias[c]);
}

template <int C, typename A> RFK_SIMD void gate_row(A* tile, const A* gate) {
#pragma omp simd
  for (int c = 0; c < C; ++c) tile[c] *= gate[c];
}

template <int C, typename A, typename S>
RFK_SIMD void add_residual(A* tile, int rows, int columns, const S* residual, int64_t stride) {
  for (int r = 0; r < rows; ++r)
#pragma omp simd
    for (int c = 0; c < columns; ++c) tile[r * C + c] += load(residual[r * stride + c]);
}

template <int C, typename A, typename T>
RFK_SIMD void store_tile(T* out, int64_t stride, const A* tile, int rows, int columns) {
  for (int r = 0; r < rows; ++r)
#pragma omp simd
    for (int c = 0; c < columns; ++c) out[r * stride + c] = store<T>(acc_t<T>(tile[r * C + c]));
}

template <int C, typename A>
RFK_SIMD void store_codes(int8_t* out, int64_t stride, const A* tile, int rows, int columns, float scale) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c) out[r * stride + c] = saturated_code(float(tile[r * C + c]) / scale);
}

// Everything behind the sums for the tile at (row, column) of the result.
template <int C, typename A> struct Finish {
  const LinearCall& call;
  const A* bias;  // [C]
  A* gate;        // [C], of row `gate_at`
  int64_t& gate_at;

  void operator()(A* tile, int64_t row, int64_t column, int rows, int columns) const {
    activate(tile, rows);
    if (call.gate) {
      for (int r = 0; r < rows; ++r) {
        const int64_t at = (row + r) / call.rows_per_gate();
        if (at != gate_at) {
          const TensorView& g = *call.gate;
          decode_any(gate, g, at * g.stride[0] + column, columns);
          gate_at = at;
        }
        gate_row<C>(tile + r * C, gate);
      }
    }
    if (call.residual)
      dispatch_float("linear", call.residual->dtype, [&]<typename S>() {
        const int64_t stride = call.residual->stride[0];
        add_residual<C>(tile, rows, columns, call.residual->ptr<S>() + row * stride + column, stride);
      });
    const int64_t stride = call.out.stride[0];
    if (call.out.dtype == DType::i8)
      return store_codes<C>(call.out.ptr<int8_t>() + row * stride + column, stride, tile, rows, columns,
                            *call.out_scale->ptr<float>());
    dispatch_float("linear", call.out.dtype, [&]<typename T>() {
      store_tile<C>(call.out.ptr<T>() + row * stride + column, stride, tile, rows, columns);
    });
  }

  void activate(A* tile, int rows) const {
    switch (call.epilogue) {
      case Epilogue::none:
        if (call.bias) activate_tile<Epilogue::none, C>(tile, rows, bias);
        return;
      case Epilogue::relu: return activate_tile<Epilogue::relu, C>(tile, rows, bias);
      case Epilogue::gelu: return activate_tile<Epilogue::gelu, C>(tile, rows, bias);
      case Epilogue::gelu_tanh: return activate_tile<Epilogue::gelu_tanh, C>(tile, rows, bias);
      case Epilogue::silu: return activate_tile<Epilogue::silu, C>(tile, rows, bias);
      case Epilogue::relu2: return activate_tile<Epilogue::relu2, C>(tile, rows, bias);
    }
  }
};

}  // namespace rfk
