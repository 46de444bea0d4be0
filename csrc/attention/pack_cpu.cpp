#include "attention/pack_cpu.h"

namespace rfk {
namespace {

RFK_SIMD void add_finite_row(float* sums, const float* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += std::fabs(row[i]) <= 3.4028235e38f ? row[i] : 0.0f;
}

RFK_SIMD void subtract(float* row, const float* mean, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] -= mean[i];
}

RFK_SIMD void raise_tops(float* tops, const float* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = std::fabs(row[i]);
    tops[i] = v <= 3.4028235e38f && v > tops[i] ? v : tops[i];
  }
}

RFK_SIMD double sum_squares(const float* row, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += row[i] * row[i];
  return sum;
}

RFK_SIMD int32_t sum_codes(const int8_t* codes, int64_t n) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += codes[i];
  return sum;
}

RFK_SIMD void code_by_column(int8_t* codes, const float* row, const float* inverse, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = std::fabs(row[i]) <= 3.4028235e38f ? row[i] : 0.0f;
    codes[i] = int8_t(std::bit_cast<int32_t>(v * inverse[i] + 0x1.8p23f) - 0x4b400000);
  }
}

// Words of neighbouring rows, column by column.
template <typename Number, typename Word, int PerWord>
RFK_SIMD void put_words(Word* out, const Number* rows, int64_t stride, int64_t columns) {
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    if constexpr (PerWord == 1) {
      out[c] = std::bit_cast<Word>(rows[c]);
    } else if constexpr (PerWord == 2) {
      out[c] = Word(rows[c].bits) | Word(rows[stride + c].bits) << 16;
    } else {
      const uint8_t* b = reinterpret_cast<const uint8_t*>(rows) + c;
      out[c] = Word(b[0]) | Word(b[stride]) << 8 | Word(b[2 * stride]) << 16 | Word(b[3 * stride]) << 24;
    }
  }
}

// A step of all panels of columns.
template <Product P, typename Number>
void put_step(const HeadLayout& l, char* values, int64_t step, const Number* rows, int64_t stride) {
  using Word = typename Numbers<P>::Word;
  Word* panel = reinterpret_cast<Word*>(values);
  for (int64_t j = 0; j < l.wide; ++j, panel += l.value_steps() * 32)
    put_words<Number, Word, numbers_of(P)>(panel + step * 32, rows + 32 * j, stride, 32);
  if (l.narrow)
    put_words<Number, Word, numbers_of(P)>(panel + step * 16, rows + 32 * l.wide, stride, 16);
}

// Tops of the columns of a tile to scales, and their inverses.
RFK_SIMD double scales_of(float* scale, float* tops, int64_t n) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const float top = tops[i] > 1e-28f ? tops[i] : 1e-28f;
    scale[i] = top / 127;
    squares += double(tops[i]) * tops[i];
    tops[i] = 127 / top;
  }
  return squares;
}

// int8 with a scale per column; keys that are not finite are marked in their scale.
void pack_value_codes(const HeadLayout& l, const TilePanels& to, const Tokens& v, int64_t first,
                      int64_t count, void* decoded) {
  const int64_t columns = l.columns();
  float* const row = static_cast<float*>(decoded);
  float* const tops = row + columns;
  int8_t* const codes = reinterpret_cast<int8_t*>(tops + columns);
  std::memset(tops, 0, columns * sizeof(float));
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    decode_row(row, v, first + i, columns);
    raise_tops(tops, row, columns);
    if (l.statistics) squares += sum_squares(row, l.d);
    if (!is_finite_row(row, l.d)) to.scale[i] = kNan, squares = kNan;
  }
  const double top_squares = scales_of(to.value_scale, tops, columns);
  if (l.statistics) to.statistics[2] = squares, to.statistics[3] = top_squares * double(count);
  for (int64_t s = 0; s < ceil_div(count, kPanel) * kPanel / 4; ++s) {
    for (int64_t i = 0; i < 4; ++i) {
      int8_t* const to_row = codes + i * columns;
      if (4 * s + i >= count) {
        std::memset(to_row, 0, columns);
        continue;
      }
      decode_row(row, v, first + 4 * s + i, columns);
      code_by_column(to_row, row, tops, columns);
    }
    put_step<Product::int8>(l, to.values, s, codes, columns);
  }
}

template <Product P>
void pack_keys(const HeadLayout& l, const TilePanels& to, const Tokens& k, int64_t first, int64_t count,
               const float* mean, void* decoded) {
  using Number = typename Numbers<P>::Number;
  using Word = typename Numbers<P>::Word;
  constexpr bool kCodes = P == Product::int8;
  const int64_t width = l.steps * numbers_of(P);
  Number* const numbers = static_cast<Number*>(decoded);
  float* const row = reinterpret_cast<float*>(numbers + kPanel * width);
  double squares = 0, top_squares = 0;
  for (int64_t panel = 0; panel * kPanel < count; ++panel) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t key = panel * kPanel + j;
      Number* const n = numbers + j * width;
      if (key >= count) {
        std::memset(static_cast<void*>(n), 0, width * sizeof(Number));
        if (kCodes) to.offset[key] = 0, to.scale[key] = 0;
      } else if constexpr (kCodes) {
        decode_row(row, k, first + key, l.d);
        subtract(row, mean, l.d);
        const CodedRow coded = code_row<false>(n, row, l.d, width);
        to.offset[key] = 128 * sum_codes(n, l.d);
        if (to.scale[key] == to.scale[key]) to.scale[key] = coded.scale;  // NaN of the value stays
        squares += coded.squares, top_squares += coded.top * coded.top;
      } else {
        decode_row(n, k, first + key, width);
      }
    }
    interleave(reinterpret_cast<Word*>(to.keys + panel * l.key_panel()), reinterpret_cast<const Word*>(numbers),
               l.steps, kPanel, l.steps);
  }
  if (kCodes && l.statistics) to.statistics[0] = squares, to.statistics[1] = top_squares;
}

template <Product P>
void pack_values(const HeadLayout& l, const TilePanels& to, const Tokens& v, int64_t first, int64_t count,
                 void* decoded) {
  if constexpr (P == Product::int8) {
    pack_value_codes(l, to, v, first, count, decoded);
  } else {
    using Number = typename Numbers<P>::Number;
    constexpr int64_t kPerWord = numbers_of(P);
    const int64_t columns = l.columns();
    Number* const rows = static_cast<Number*>(decoded);
    for (int64_t s = 0; s < ceil_div(count, kPanel) * kPanel / kPerWord; ++s) {
      for (int64_t i = 0; i < kPerWord; ++i) {
        if (s * kPerWord + i < count)
          decode_row(rows + i * columns, v, first + s * kPerWord + i, columns);
        else
          std::memset(static_cast<void*>(rows + i * columns), 0, columns * sizeof(Number));
      }
      put_step<P>(l, to.values, s, rows, columns);
    }
  }
}

template <Product P> constexpr PackFunctions kFunctions = {pack_keys<P>, pack_values<P>};

}  // namespace

void add_finite(float* sums, const Tokens& t, int64_t first, int64_t count, float* decoded) {
  for (int64_t i = first; i < first + count; ++i) {
    decode_row(decoded, t, i, t.d);
    add_finite_row(sums, decoded, t.d);
  }
}

PackFunctions pack_functions(Products p) {
  constexpr PackFunctions kAll[] = {kFunctions<Product::int8>, kFunctions<Product::bf16>,
                                    kFunctions<Product::f32>, kFunctions<Product::f64>};
  return {kAll[int(p.scores)].keys, kAll[int(p.values)].values};
}

}  // namespace rfk
