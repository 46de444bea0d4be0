#ifdef __x86_64__
#include <immintrin.h>

#include "core/tiles.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
#include "core/register_tile.h"

namespace rfk {
namespace {

template <bool kAdd, bool kByRow> void scale_into(float* c, __m512 sums, Scale s, int column, int row) {
  __m512 scale = _mm512_loadu_ps(static_cast<const float*>(s.scale) + column);
  if (kByRow) scale = _mm512_mul_ps(scale, _mm512_set1_ps(s.row[row]));
  _mm512_storeu_ps(c, kAdd ? _mm512_fmadd_ps(sums, scale, _mm512_loadu_ps(c)) : _mm512_mul_ps(sums, scale));
}

// `asm`, because GCC 12 copies the sums of the intrinsics from register to register.
struct Int8 {
  using Word = int32_t;
  using Sum = int32_t;
  using Number = float;
  using Vector = __m512i;
  using Operand = __m512i;
  static constexpr int kLanes = 16;
  static Vector load(const Sum* p) { return _mm512_loadu_si512(p); }
  static void store(Sum* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector minus_offset(Scale s, int column) { return _mm512_sub_epi32(zero(), load(s.offset + column)); }
  static Operand operand(const Word* p) { return _mm512_loadu_si512(p); }
  static Vector broadcast(Word w) { return _mm512_set1_epi32(w); }
  template <bool kAdd, bool kByRow>
  static void scale(Number* c, Vector sums, Scale s, int column, int row) {
    scale_into<kAdd, kByRow>(c, _mm512_cvtepi32_ps(sums), s, column, row);
  }
  static constexpr int kPerWord = 4;
  static Vector weights(const char* p, int64_t left) {
    return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << left) - 1, p);
  }
  static Vector tokens(const char* p, int64_t left) {
    return _mm512_xor_si512(weights(p, left), _mm512_set1_epi8(int8_t(0x80)));
  }
  static void dot(Vector& sum, Vector x, Operand w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  }
};

struct Float {
  using Word = float;
  using Sum = float;
  using Number = float;
  using Vector = __m512;
  using Operand = __m512;
  static constexpr int kLanes = 16;
  static Vector load(const Sum* p) { return _mm512_loadu_ps(p); }
  static void store(Sum* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector minus_offset(Scale, int) { return zero(); }
  static Operand operand(const Word* p) { return _mm512_loadu_ps(p); }
  static Vector broadcast(Word w) { return _mm512_set1_ps(w); }
  template <bool kAdd, bool kByRow>
  static void scale(Number* c, Vector sums, Scale s, int column, int row) {
    scale_into<kAdd, kByRow>(c, sums, s, column, row);
  }
  static constexpr int kPerWord = 1;
  static Vector weights(const char* p, int64_t left) {
    return left >= 16 ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(__mmask16((1u << left) - 1), p);
  }
  static Vector tokens(const char* p, int64_t left) { return weights(p, left); }
  static void dot(Vector& sum, Vector x, Operand w) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  }
};

struct Bf16 : Float {
  static constexpr int kPerWord = 2;
  static Vector weights(const char* p, int64_t left) {
    const __mmask32 there = left >= 32 ? ~0u : (1u << left) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, p));
  }
  static Vector tokens(const char* p, int64_t left) { return weights(p, left); }
  static void dot(Vector& sum, Vector x, Operand w) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  }
};

// Sums of four vectors, side by side.
__m128i sum_lanes(const __m512i (&v)[4]) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

__m128 sum_lanes(const __m512 (&v)[4]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  const __m512 c =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
  return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

void put_lanes(void* c, __m128i sums, Into into, Scale s, int column) {
  auto* const to = static_cast<float*>(c);
  if (into == Into::set) return _mm_storeu_si128(static_cast<__m128i*>(c), sums);
  const __m128i offset = _mm_loadu_si128(reinterpret_cast<const __m128i*>(s.offset + column));
  const __m128 scale = _mm_loadu_ps(static_cast<const float*>(s.scale) + column);
  _mm_storeu_ps(to, _mm_mul_ps(_mm_cvtepi32_ps(_mm_sub_epi32(sums, offset)), scale));
}

void put_lanes(void* c, __m128 sums, Into into, Scale s, int column) {
  if (into != Into::set) sums = _mm_mul_ps(sums, _mm_loadu_ps(static_cast<const float*>(s.scale) + column));
  _mm_storeu_ps(static_cast<float*>(c), sums);
}

// Rows x 4 sums along k, at (row, column) of the tile.
template <typename V, int Rows, int BColumns>
void direct_register_tile(int64_t k, const Matrix& x, const Matrix& w, int row, int column, void* c,
                          Into into, Scale scale) {
  constexpr int kStep = 16 * V::kPerWord;
  const char *from[Rows], *to[4];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) from[i] = x.row(row + i);
  for (int j = 0; j < 4; ++j) to[j] = w.row(column + j);
  typename V::Vector sums[Rows][4];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = V::zero();
  for (int64_t at = 0; at < k; at += kStep) {
    const int64_t left = k - at, byte = at * 4 / V::kPerWord;
    typename V::Vector v[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) v[i] = V::tokens(from[i] + byte, left);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const typename V::Vector weight = V::weights(to[j] + byte, left);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) V::dot(sums[i][j], v[i], weight);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
    put_lanes(static_cast<float*>(c) + (row + i) * BColumns + column, sum_lanes(sums[i]), into, scale,
              column);
}

template <typename V, int Rows, int ARows, int BColumns>
void direct_tile(int64_t k, Matrix x, Matrix w, void* c, Into into, Scale scale) {
  for (int row = 0; row < ARows && row < x.count; row += Rows)
    for (int column = 0; column < BColumns && column < w.count; column += 4)
      direct_register_tile<V, Rows, BColumns>(k, x, w, row, column, c, into, scale);
}

template <Product P, Into kInto, typename V> constexpr void fill(Tiles& t) {
  t[P].tile[kTile12x32] = tile<V, 12, 2, Interleaved<12>, 32>;
  t[P].tile[kTile4x32] = tile<V, 4, 2, Interleaved<4>, 32>;
  t[P].tile[kTile24x16] = tile<V, 24, 1, Interleaved<24>, 16>;
  t[P].direct[kTile12x32] = direct_tile<V, 6, 12, 32>;
  t[P].direct[kTile4x32] = direct_tile<V, 4, 4, 32>;
  t[P].direct[kTile24x16] = direct_tile<V, 6, 24, 16>;
  constexpr int kStride = weight_stride(P);
  t[P].values[kValues12x32] = value_tile<kInto, V, 12, 2, RowMajor<12, kStride>, 32>;
  t[P].values[kValues12x16] = value_tile<kInto, V, 12, 1, RowMajor<12, kStride>, 16>;
  t[P].values[kValues4x32] = value_tile<kInto, V, 4, 2, RowMajor<4, kStride>, 32>;
  t[P].values[kValues4x16] = value_tile<kInto, V, 4, 1, RowMajor<4, kStride>, 16>;
}

constexpr Tiles make() {
  Tiles t{};
  fill<Product::int8, Into::add_scaled_by_row, Int8>(t);
  fill<Product::bf16, Into::add, Bf16>(t);
  fill<Product::f32, Into::add, Float>(t);
  return t;
}

}  // namespace

const Tiles kTilesAvx512 = make();

}  // namespace rfk
#endif
