#ifdef __x86_64__
#include <immintrin.h>

#include "core/tiles.h"

#pragma GCC target("avx2,fma")  // AVX-VNNI stands in `asm` alone: most CPUs of this file lack it
#include "core/register_tile.h"

namespace rfk {
namespace {

template <bool kAdd, bool kByRow> void scale_into(float* c, __m256 sums, Scale s, int column, int row) {
  __m256 scale = _mm256_loadu_ps(static_cast<const float*>(s.scale) + column);
  if (kByRow) scale = _mm256_mul_ps(scale, _mm256_set1_ps(s.row[row]));
  _mm256_storeu_ps(c, kAdd ? _mm256_fmadd_ps(sums, scale, _mm256_loadu_ps(c)) : _mm256_mul_ps(sums, scale));
}

struct Float {
  using Word = float;
  using Sum = float;
  using Number = float;
  using Vector = __m256;
  using Operand = __m256;
  static constexpr int kLanes = 8;
  static Vector load(const Sum* p) { return _mm256_loadu_ps(p); }
  static void store(Sum* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector minus_offset(Scale, int) { return zero(); }
  static Operand operand(const Word* p) { return _mm256_loadu_ps(p); }
  static Vector broadcast(Word w) { return _mm256_set1_ps(w); }
  template <bool kAdd, bool kByRow>
  static void scale(Number* c, Vector sums, Scale s, int column, int row) {
    scale_into<kAdd, kByRow>(c, sums, s, column, row);
  }
  static void dot(Vector& sum, Vector x, Operand w) { sum = _mm256_fmadd_ps(x, w, sum); }
};

struct Integer {
  using Word = int32_t;
  using Sum = int32_t;
  using Number = float;
  using Vector = __m256i;
  static constexpr int kLanes = 8;
  static Vector load(const Sum* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(Sum* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector minus_offset(Scale s, int column) { return _mm256_sub_epi32(zero(), load(s.offset + column)); }
  template <bool kAdd, bool kByRow>
  static void scale(Number* c, Vector sums, Scale s, int column, int row) {
    scale_into<kAdd, kByRow>(c, _mm256_cvtepi32_ps(sums), s, column, row);
  }
};

struct VnniInt8 : Integer {
  using Operand = __m256i;
  static Operand operand(const Word* p) { return load(p); }
  static Vector broadcast(Word w) { return _mm256_set1_epi32(w); }
  static void dot(Vector& sum, Vector x, Operand w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
  }
};

// Bytes widened to 16 bits before they are multiplied: vpmaddubsw would saturate sums of two products.
struct Int8 : Integer {
  struct Operand {
    __m256i even, odd;
  };
  struct Pair {
    __m256i even, odd;
  };
  static Operand operand(const Word* p) {
    const __m256i v = load(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static Pair broadcast(Word w) {
    const __m256i v = _mm256_set1_epi32(w);
    return {_mm256_and_si256(v, _mm256_set1_epi16(255)), _mm256_srli_epi16(v, 8)};
  }
  static void dot(Vector& sum, Pair x, Operand w) {
    const __m256i products =
        _mm256_add_epi32(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd));
    sum = _mm256_add_epi32(sum, products);
  }
};

template <Product P, Into kInto, typename V, int Vectors> constexpr void fill(Tiles& t) {
  t[P].tile[kTile12x32] = tile<V, 4, Vectors, Interleaved<12>, 32>;
  t[P].tile[kTile4x32] = tile<V, 4, Vectors, Interleaved<4>, 32>;
  t[P].tile[kTile24x16] = tile<V, 4, Vectors, Interleaved<24>, 16>;
  constexpr int kStride = weight_stride(P);
  t[P].values[kValues12x32] = value_tile<kInto, V, 4, Vectors, RowMajor<12, kStride>, 32>;
  t[P].values[kValues12x16] = value_tile<kInto, V, 4, Vectors, RowMajor<12, kStride>, 16>;
  t[P].values[kValues4x32] = value_tile<kInto, V, 4, Vectors, RowMajor<4, kStride>, 32>;
  t[P].values[kValues4x16] = value_tile<kInto, V, 4, Vectors, RowMajor<4, kStride>, 16>;
}

template <typename V, int Vectors> constexpr Tiles make() {
  Tiles t{};
  fill<Product::int8, Into::add_scaled_by_row, V, Vectors>(t);
  fill<Product::f32, Into::add, Float, 2>(t);
  return t;
}

}  // namespace

const Tiles kTilesAvx2 = make<Int8, 1>();
const Tiles kTilesAvxVnni = make<VnniInt8, 2>();

}  // namespace rfk
#endif
