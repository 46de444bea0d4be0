#include <cstring>

#include "core/hd.h"
#include "linear/tiles.h"

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
      if constexpr (sizeof(Sum) == 4 && Sum(1) / 2 == 0) sum -= s.offset[j];  // an integer
      const Number v = Number(sum) * scale[j];
      numbers[at] = into == Into::add_scaled ? numbers[at] + v : v;
    }
}

template <typename T, int Rows, int Columns>
RFK_SIMD void generic_tile(int64_t steps, const void* a, const void* b, void* c, Into into, Scale scale) {
  const T* x = static_cast<const T*>(a);
  const T* w = static_cast<const T*>(b);
  T sums[Rows * Columns] = {};
  if (into == Into::add) std::memcpy(sums, c, sizeof(sums));
  for (int64_t s = 0; s < steps; ++s, x += Rows, w += Columns)
    for (int i = 0; i < Rows; ++i)
#pragma omp simd
      for (int j = 0; j < Columns; ++j) sums[i * Columns + j] += x[i] * w[j];
  put<T, Rows, Columns>(c, sums, into, scale);
}

template <int Rows, int Columns>
RFK_SIMD void generic_tile_int8(int64_t steps, const void* a, const void* b, void* c, Into into,
                                Scale scale) {
  const uint8_t* x = static_cast<const uint8_t*>(a);
  const int8_t* w = static_cast<const int8_t*>(b);
  int32_t sums[Rows * Columns] = {};
  if (into == Into::add) std::memcpy(sums, c, sizeof(sums));
  for (int64_t s = 0; s < steps; ++s, x += 4 * Rows, w += 4 * Columns)
    for (int i = 0; i < Rows; ++i)
#pragma omp simd
      for (int j = 0; j < Columns; ++j)
        for (int q = 0; q < 4; ++q) sums[i * Columns + j] += int32_t(x[4 * i + q]) * w[4 * j + q];
  put<float, Rows, Columns>(c, sums, into, scale);
}

}  // namespace

const Tiles kTilesGeneric = {
    .int8 = {generic_tile_int8<12, 32>, generic_tile_int8<4, 32>, generic_tile_int8<24, 16>},
    .bf16 = {},
    .f32 = {generic_tile<float, 12, 32>, generic_tile<float, 4, 32>, generic_tile<float, 24, 16>},
    .f64 = {generic_tile<double, 12, 32>, generic_tile<double, 4, 32>, generic_tile<double, 24, 16>},
};

}  // namespace rfk
