#include <cstring>
#include <type_traits>

#include "core/hd.h"
#include "core/tiles.h"

// Products in plain C++, for every CPU.

namespace rfk {
namespace {

template <typename Number, int Rows, int Columns, typename Sum>
RFK_HD void put(void* c, const Sum (&sums)[Rows * Columns], Into into, Scale s) {
  auto* const numbers = static_cast<Number*>(c);
  const auto* const scale = static_cast<const Number*>(s.scale);
  if (into == Into::set || into == Into::add) {
    std::memcpy(c, sums, sizeof(sums));
    return;
  }
  for (int i = 0; i < Rows; ++i)
#pragma omp simd
    for (int j = 0; j < Columns; ++j) {
      const int at = i * Columns + j;
      Sum sum = sums[at];
      Number factor = scale[j];
      if (into == Into::add_scaled_by_row)
        factor *= s.row[i];
      else if constexpr (sizeof(Sum) == 4 && Sum(1) / 2 == 0)  // an integer
        sum -= s.offset[j];
      const Number v = Number(sum) * factor;
      numbers[at] = into == Into::set_scaled ? v : numbers[at] + v;
    }
}

// The sums of a step: numbers, or four int8 in a word, unsigned by signed.
template <typename T, typename A, int Columns>
RFK_SIMD void generic_tile(int64_t steps, const void* a, const void* b, void* c, Into into, Scale scale) {
  constexpr bool kInt8 = sizeof(T) == 1;
  constexpr int kPerWord = kInt8 ? 4 : 1;
  using Sum = std::conditional_t<kInt8, int32_t, T>;
  using X = std::conditional_t<kInt8, uint8_t, T>;
  const X* x = static_cast<const X*>(a);
  const T* w = static_cast<const T*>(b);
  Sum sums[A::kRows * Columns] = {};
  if (into == Into::add) std::memcpy(sums, c, sizeof(sums));
  for (int64_t s = 0; s < steps; ++s, x += kPerWord * A::kStep, w += kPerWord * Columns)
    for (int i = 0; i < A::kRows; ++i)
#pragma omp simd
      for (int j = 0; j < Columns; ++j)
        for (int q = 0; q < kPerWord; ++q)
          sums[i * Columns + j] += Sum(x[kPerWord * i * A::kRow + q]) * w[kPerWord * j + q];
  put<std::conditional_t<kInt8, float, T>, A::kRows, Columns>(c, sums, into, scale);
}

template <Product P, typename T> constexpr void fill(Tiles& t) {
  t[P].tile[kTile12x32] = generic_tile<T, Interleaved<12>, 32>;
  t[P].tile[kTile4x32] = generic_tile<T, Interleaved<4>, 32>;
  t[P].tile[kTile24x16] = generic_tile<T, Interleaved<24>, 16>;
  constexpr int kStride = weight_stride(P);
  t[P].values[kValues12x32] = generic_tile<T, RowMajor<12, kStride>, 32>;
  t[P].values[kValues12x16] = generic_tile<T, RowMajor<12, kStride>, 16>;
  t[P].values[kValues4x32] = generic_tile<T, RowMajor<4, kStride>, 32>;
  t[P].values[kValues4x16] = generic_tile<T, RowMajor<4, kStride>, 16>;
}

constexpr Tiles make() {
  Tiles t{};
  fill<Product::int8, int8_t>(t);
  fill<Product::f32, float>(t);
  fill<Product::f64, double>(t);
  return t;
}

}  // namespace

const Tiles kTilesGeneric = make();

}  // namespace rfk
