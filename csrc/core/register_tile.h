#pragma once

#include "core/tiles.h"

// Tiles out of vector registers. Included behind the `#pragma GCC target` of an instruction set, and in an
// unnamed namespace, so that every file has its own.

namespace rfk {
namespace {

// One register tile of V vectors, Rows x Vectors of them, at row `row` and a column of the tile.
template <Into kInto, typename V, int Rows, int Vectors, typename A, int BColumns>
inline __attribute__((always_inline)) void register_tile(int64_t steps, const typename V::Word* a,
                                                         const typename V::Word* b, void* c, Scale scale,
                                                         int row) {
  constexpr bool kByRow = kInto == Into::add_scaled_by_row;
  typename V::Vector sums[Rows][Vectors];
  auto* const whole = static_cast<typename V::Sum*>(c);
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j)
      sums[i][j] = kInto == Into::add             ? V::load(whole + i * BColumns + j * V::kLanes)
                   : kInto == Into::set || kByRow ? V::zero()
                                                  : V::minus_offset(scale, j * V::kLanes);
  for (int64_t s = 0; s < steps; ++s, a += A::kStep, b += BColumns) {
    typename V::Operand w[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) w[j] = V::operand(b + j * V::kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i) {
      const auto x = V::broadcast(a[i * A::kRow]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) V::dot(sums[i][j], x, w[j]);
    }
  }
  constexpr bool kScaled = kInto == Into::set_scaled || kInto == Into::add_scaled || kByRow;
  auto* const numbers = static_cast<typename V::Number*>(c);
#pragma GCC unroll 24
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const int at = i * BColumns + j * V::kLanes;
      if constexpr (kScaled)
        V::template scale<kInto != Into::set_scaled, kByRow>(numbers + at, sums[i][j], scale, j * V::kLanes,
                                                             row + i);
      else
        V::store(whole + at, sums[i][j]);
    }
}

template <Into kInto, typename V, int Rows, int Vectors, typename A, int BColumns>
void register_tiles(int64_t steps, const void* a, const void* b, void* c, Scale scale) {
  static_assert(A::kRows % Rows == 0 && BColumns % (Vectors * V::kLanes) == 0);
  static_assert(sizeof(typename V::Sum) == sizeof(typename V::Number));
  for (int j = 0; j < BColumns; j += Vectors * V::kLanes) {
    const Scale at{scale.offset + j, static_cast<const typename V::Number*>(scale.scale) + j, scale.row};
    for (int i = 0; i < A::kRows; i += Rows)
      register_tile<kInto, V, Rows, Vectors, A, BColumns>(
          steps, static_cast<const typename V::Word*>(a) + i * A::kRow,
          static_cast<const typename V::Word*>(b) + j, static_cast<typename V::Sum*>(c) + i * BColumns + j,
          at, i);
  }
}

// A whole tile out of register tiles.
template <typename V, int Rows, int Vectors, typename A, int BColumns>
void tile(int64_t steps, const void* a, const void* b, void* c, Into into, Scale scale) {
  switch (into) {
    case Into::set: return register_tiles<Into::set, V, Rows, Vectors, A, BColumns>(steps, a, b, c, scale);
    case Into::add: return register_tiles<Into::add, V, Rows, Vectors, A, BColumns>(steps, a, b, c, scale);
    case Into::set_scaled:
      return register_tiles<Into::set_scaled, V, Rows, Vectors, A, BColumns>(steps, a, b, c, scale);
    case Into::add_scaled:
      return register_tiles<Into::add_scaled, V, Rows, Vectors, A, BColumns>(steps, a, b, c, scale);
    case Into::add_scaled_by_row:
      return register_tiles<Into::add_scaled_by_row, V, Rows, Vectors, A, BColumns>(steps, a, b, c, scale);
  }
}

// Attention weights (tiles.h) times values: what becomes of the sums is `add`, of integers by row.
template <Into kInto, typename V, int Rows, int Vectors, typename A, int BColumns>
void value_tile(int64_t steps, const void* a, const void* b, void* c, Into, Scale scale) {
  register_tiles<kInto, V, Rows, Vectors, A, BColumns>(steps, a, b, c, scale);
}

}  // namespace
}  // namespace rfk
