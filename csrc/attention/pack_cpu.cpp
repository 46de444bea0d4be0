#include "attention/pack_cpu.h"

#include "core/dispatch.h"

namespace rfk {
namespace {

constexpr int32_t kInfinity = 0x7f800000;

// What is not finite becomes 0.
RFK_HD void keep_finite(Floats& v) { v = ((Integers)v & 0x7fffffff) < kInfinity ? v : Floats{}; }

template <typename T> RFK_SIMD void add_finite_row(Floats* sums, const T* row, int64_t n) {
  Floats v[kMaxHeadDim / 16];
  load_row(v, row, n);
  for (int64_t i = 0; i < padded(n) / 16; ++i) {
    keep_finite(v[i]);
    sums[i] += v[i];
  }
}

// Raises the tops of columns, as bits of floats, to what is finite of a row. Returns the sum of squares, NaN
// if something is not.
template <typename T> RFK_SIMD float raise_tops(Integers* tops, const T* row, int64_t n) {
  Floats v[kMaxHeadDim / 16], squares = {};
  Integers all = {};
  load_row(v, row, n);
  for (int64_t i = 0; i < padded(n) / 16; ++i) {
    const Integers bits = (Integers)v[i] & 0x7fffffff, known = bits < kInfinity ? bits : Integers{};
    all = bits > all ? bits : all;
    tops[i] = known > tops[i] ? known : tops[i];
    squares += v[i] * v[i];
  }
  return top(all) < kInfinity ? total(squares) : kNan;
}

template <typename T>
RFK_SIMD void code_by_column(int8_t* codes, const T* row, const float* inverse, int64_t n) {
  Floats v[kMaxHeadDim / 16];
  load_row(v, row, n);
  for (int64_t i = 0; i < padded(n) / 16; ++i) {
    Floats by;
    std::memcpy(&by, inverse + 16 * i, sizeof(by));
    keep_finite(v[i]);
    const Integers code = (Integers)(v[i] * by + 0x1.8p23f) - 0x4b400000;
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    std::memcpy(codes + 16 * i, &bytes, sizeof(bytes));
  }
}

// Tops of columns to scales and, in their place, the inverses of these. Returns the sum of their squares.
RFK_SIMD float scales_of(float* scale, float* tops, int64_t n) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) {
    const float top = tops[i] > 1e-28f ? tops[i] : 1e-28f;
    scale[i] = top / 127;
    squares += tops[i] * tops[i];
    tops[i] = 127 / top;
  }
  return squares;
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
void put_step(const PanelLayout& l, char* values, int64_t step, const Number* rows, int64_t stride) {
  using Word = typename Numbers<P>::Word;
  Word* panel = reinterpret_cast<Word*>(values);
  for (int64_t j = 0; j < l.wide; ++j, panel += l.value_steps() * 32)
    put_words<Number, Word, numbers_of(P)>(panel + step * 32, rows + 32 * j, stride, 32);
  if (l.narrow) put_words<Number, Word, numbers_of(P)>(panel + step * 16, rows + 32 * l.wide, stride, 16);
}

// int8 with a scale per column; keys that are not finite are marked in their scale. Word w of 64 keys has
// keys w, w + 16, w + 32 and w + 48, in the order of softmax_tile.h.
template <typename T>
void pack_value_codes(const PanelLayout& l, const TilePanels& to, const HeadTokens& v, int64_t first,
                      int64_t count, void* scratch) {
  const int64_t columns = l.columns();
  int32_t* const tops = static_cast<int32_t*>(scratch);
  float* const inverse = static_cast<float*>(scratch);
  int8_t* const codes = reinterpret_cast<int8_t*>(tops + columns);
  std::memset(scratch, 0, columns * (4 + 4));
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float sum = raise_tops(reinterpret_cast<Integers*>(tops), v.row_of<T>(first + i), l.d);
    if (sum != sum) to.scale[i] = kNan;
    squares += sum;
  }
  const double top_squares = scales_of(to.value_scale, inverse, columns);
  if (l.statistics) to.statistics[2] = squares, to.statistics[3] = top_squares * double(count);
  for (int64_t group = 0; group < count; group += 64)
    for (int64_t w = 0; w < 16; ++w) {
      for (int64_t q = 0; q < 4; ++q) {
        const int64_t key = group + 16 * q + w;
        if (key < count)
          code_by_column(codes + q * columns, v.row_of<T>(first + key), inverse, l.d);
        else
          std::memset(codes + q * columns, 0, columns);
      }
      put_step<Product::int8>(l, to.values, group / 4 + w, codes, columns);
    }
}

template <typename T>
void pack_key_codes(const PanelLayout& l, const TilePanels& to, const HeadTokens& k, int64_t first,
                    int64_t count, const float* mean, void* scratch) {
  const int64_t width = l.steps * 4;  // of a row; the next one overwrites codes behind it
  int8_t* const codes = static_cast<int8_t*>(scratch);
  double squares = 0, top_squares = 0;
  for (int64_t panel = 0; panel * kPanel < count; ++panel) {
    for (int64_t j = 0; j < kPanel; ++j) {
      const int64_t key = panel * kPanel + j;
      if (key >= count) {
        std::memset(codes + j * width, 0, width);
        to.offset[key] = 0;
        continue;
      }
      const CodedRow coded =
          code_row<RowIs::key>(codes + j * width, k.row_of<T>(first + key), mean, 1.0f, l.d);
      to.offset[key] = 128 * coded.sum;
      to.scale[key] += coded.scale;  // NaN of the value stays
      squares += coded.squares, top_squares += double(coded.top) * coded.top;
    }
    interleave(reinterpret_cast<uint32_t*>(to.keys + panel * l.key_panel()),
               reinterpret_cast<const uint32_t*>(codes), l.steps, kPanel, l.steps);
  }
  if (l.statistics) to.statistics[0] = squares, to.statistics[1] = top_squares;
}

template <Product P>
void pack_keys(const PanelLayout& l, const TilePanels& to, const HeadTokens& k, int64_t first, int64_t count,
               const float* mean, void* scratch) {
  using Number = typename Numbers<P>::Number;
  using Word = typename Numbers<P>::Word;
  if constexpr (P == Product::int8) {
    dispatch_float("attention", k.dtype,
                   [&]<typename T>() { pack_key_codes<T>(l, to, k, first, count, mean, scratch); });
  } else {
    const int64_t width = l.steps * numbers_of(P);
    Number* const numbers = static_cast<Number*>(scratch);
    for (int64_t key = 0; key < count; key += kPanel) {
      for (int64_t j = 0; j < kPanel; ++j) {
        if (key + j < count)
          decode_row(numbers + j * width, k, first + key + j, width);
        else
          std::memset(static_cast<void*>(numbers + j * width), 0, width * sizeof(Number));
      }
      interleave(reinterpret_cast<Word*>(to.keys + key / kPanel * l.key_panel()),
                 reinterpret_cast<const Word*>(numbers), l.steps, kPanel, l.steps);
    }
  }
}

template <Product P>
void pack_values(const PanelLayout& l, const TilePanels& to, const HeadTokens& v, int64_t first,
                 int64_t count, void* scratch) {
  if constexpr (P == Product::int8) {
    dispatch_float("attention", v.dtype,
                   [&]<typename T>() { pack_value_codes<T>(l, to, v, first, count, scratch); });
  } else {
    using Number = typename Numbers<P>::Number;
    constexpr int64_t kPerWord = numbers_of(P);
    const int64_t columns = l.columns();
    Number* const rows = static_cast<Number*>(scratch);
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

PackFunctions pack_functions(Products p) {
  constexpr PackFunctions kAll[] = {kFunctions<Product::int8>, kFunctions<Product::bf16>,
                                    kFunctions<Product::f32>, kFunctions<Product::f64>};
  return {kAll[int(p.scores)].keys, kAll[int(p.values)].values};
}

void add_finite(float* sums, const HeadTokens& t, int64_t first, int64_t count) {
  dispatch_float("attention", t.dtype, [&]<typename T>() {
    for (int64_t i = first; i < first + count; ++i)
      add_finite_row(reinterpret_cast<Floats*>(sums), t.row_of<T>(i), t.d);
  });
}

}  // namespace rfk
