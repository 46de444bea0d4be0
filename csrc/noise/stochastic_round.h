#pragma once

#include <cmath>
#include <optional>
#include <string_view>

#include "core/check.h"
#include "core/quantize.h"
#include "noise/noise_rows.h"

// Unbiased rounding to the numbers of a smaller type: the floating ones have a step of 2^(e - digits) in
// [2^e, 2^(e+1)), below 2^least the same as there; integers have the step 1.

namespace rfk {

struct Bf16Grid {
  using Code = bf16;
  static constexpr int kDigits = 7, kLeast = -126;
  static constexpr float kLow = -0x1.fep127f, kHigh = 0x1.fep127f;
  static constexpr bool kSaturates = false;
  RFK_HD static Code code(float v) { return store<bf16>(v); }
};
struct F16Grid {
  using Code = f16;
  static constexpr int kDigits = 10, kLeast = -14;
  static constexpr float kLow = -65504, kHigh = 65504;
  static constexpr bool kSaturates = false;
  RFK_HD static Code code(float v) { return store<f16>(v); }
};
struct E4m3Grid {
  using Code = uint8_t;
  static constexpr int kDigits = 3, kLeast = -6;
  static constexpr float kLow = -448, kHigh = 448;
  static constexpr bool kSaturates = true;
  RFK_HD static Code code(float v) { return encode_e4m3(v); }
};
struct E5m2Grid {
  using Code = uint8_t;
  static constexpr int kDigits = 2, kLeast = -14;
  static constexpr float kLow = -57344, kHigh = 57344;
  static constexpr bool kSaturates = true;
  // The upper half of the f16, whose lower half is zero.
  RFK_HD static Code code(float v) { return uint8_t(detail::bits_of_f16(v) >> 8); }
};
struct Int8Grid {
  using Code = int8_t;
  static constexpr int kDigits = 7, kLeast = 7;
  static constexpr float kLow = -127, kHigh = 127;
  static constexpr bool kSaturates = true;
  RFK_HD static Code code(float v) { return Code(int32_t(v == v ? v : 0)); }
};
struct Uint8Grid {
  using Code = uint8_t;
  static constexpr int kDigits = 8, kLeast = 8;
  static constexpr float kLow = 0, kHigh = 255;
  static constexpr bool kSaturates = true;
  RFK_HD static Code code(float v) { return Code(int32_t(v == v ? v : 0)); }
};

// s floor(y / s + u) with the step s of the grid at y and u = (word >> 8) 2^-24, to the bit: no sum is
// rounded. The sign of y is kept by zeros too. Beyond the grid: its end if it saturates, else y. NaN stays.
template <typename Grid> RFK_HD float round_stochastically(float y, uint32_t word) {
  constexpr int kDrop = 23 - Grid::kDigits;
  constexpr uint32_t kMask = (1u << kDrop) - 1;
  const uint32_t bits = std::bit_cast<uint32_t>(y), sign = bits & 0x80000000, magnitude = bits ^ sign;
  const bool negative = sign != 0;

  // Where the step grows with y the digits dropped are y / s - floor(y / s) for y > 0: a carry rounds up. For
  // y < 0 the magnitude goes up where they exceed u.
  const uint32_t added = (word >> (32 - kDrop)) ^ (negative ? kMask : 0);
  uint32_t rounded = (magnitude + added) & ~kMask;
  if constexpr (Grid::kLeast > -126) {  // below, the step is constant
    constexpr float kStep = std::bit_cast<float>(uint32_t(127 + Grid::kLeast - Grid::kDigits) << 23);
    constexpr uint32_t kLeastBits = uint32_t(127 + Grid::kLeast) << 23;
    const bool small = magnitude < kLeastBits;
    const float quotient = std::bit_cast<float>(detail::choose(small, magnitude, 0)) * (1 / kStep);
    const int32_t below = int32_t(quotient);
    const float part = quotient - float(below), u = float(int32_t(word >> 8)) * 0x1p-24f;
    const int32_t up = negative ? int32_t(part > u) : int32_t(part >= 1 - u);
    rounded = detail::choose(small, std::bit_cast<uint32_t>(float(below + up) * kStep), rounded);
  }
  const float inside = std::bit_cast<float>(rounded | sign);
  const bool above = y > Grid::kHigh, under = y < Grid::kLow;
  if constexpr (Grid::kSaturates) return y != y ? y : above ? Grid::kHigh : under ? Grid::kLow : inside;
  return y != y || above || under ? y : inside;
}

// Codes of x / c. The words are those of one stream, element by element in the order of memory.
template <typename Grid> struct StochasticRound {
  using Code = typename Grid::Code;
  using Draw = uint32_t;
  const float* x;
  RowScalar<float> scale;  // no data: 1

  struct Row {
    const float* x;
    float c;
    RFK_HD Code operator()(int64_t at, uint32_t word) const {
      return Grid::code(round_stochastically<Grid>(x[at] / c, word));
    }
  };
  RFK_HD Row row(RowIndex r) const { return {x, scale.data ? scale.at(r) : 1.0f}; }
};

// Noise keys have seeds below 2^63: with the bit above them the words are of no normal's.
struct RoundingKey {
  int64_t seed;
  RFK_HD NoiseKey of(int64_t) const {
    return {uint32_t(seed), uint32_t(uint64_t(seed) >> 32) | 0x80000000u, 0, 0};
  }
};

// Calls f.operator()<Grid>() for the grid of that name.
template <typename F> void dispatch_grid(const char* op, std::string_view name, F&& f) {
  if (name == "bf16") return f.template operator()<Bf16Grid>();
  if (name == "f16") return f.template operator()<F16Grid>();
  if (name == "e4m3") return f.template operator()<E4m3Grid>();
  if (name == "e5m2") return f.template operator()<E5m2Grid>();
  if (name == "int8") return f.template operator()<Int8Grid>();
  if (name == "uint8") return f.template operator()<Uint8Grid>();
  fail(op, ": grid must be bf16, f16, e4m3, e5m2, int8 or uint8, got ", name);
}

template <typename NoiseRows>
void run_stochastic_round(const NoiseRows& noise_rows, const TensorView& out, const TensorView& x,
                          const std::optional<TensorView>& scale, int64_t seed, std::string_view grid) {
  RowArg rows[1];
  const size_t count = scale ? 1 : 0;
  if (scale) rows[0] = {"scale", *scale};
  const NoiseShape shape{1, x.numel(), plan_rows("stochastic_round", x, std::span(rows, count))};
  const RowScalar<float> c = scale ? rows[0].scalar<float>() : RowScalar<float>{};
  dispatch_grid("stochastic_round", grid, [&]<typename Grid>() {
    noise_rows(out.ptr<typename Grid::Code>(), RoundingKey{seed}, shape,
               StochasticRound<Grid>{x.ptr<float>(), c});
  });
}

}  // namespace rfk
