#ifdef __x86_64__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header, GCC bug 105593
#include <immintrin.h>

#include "attention/softmax.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#include "attention/softmax_tile.h"

namespace rfk {
namespace {

struct Lanes {
  using V = __m512;
  using Word = uint32_t;
  static constexpr int kLanes = 16;
  static constexpr bool kExact = false;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V set(float v) { return _mm512_set1_ps(v); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where one is NaN
  static V first(V v, int count) {
    const __mmask16 there = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
    return _mm512_mask_mov_ps(set(-std::numeric_limits<float>::infinity()), there, v);
  }
  static V if_equal(V a, V b, V then, V otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), otherwise, then);
  }
  struct Parts {
    V r, x;
  };
  static Parts split(V x) { return {_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF), x}; }  // r of -infinity is 0
  static V times_power(V p, Parts parts) { return _mm512_scalef_ps(p, parts.x); }  // 2^floor(x)
  static float top(V v) { return _mm512_reduce_max_ps(v); }
  static float total(V v) { return _mm512_reduce_add_ps(v); }
  static void store_bf16(uint32_t* p, V a, V b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  using I __attribute__((vector_size(64))) = int32_t;
  static void store_words(uint32_t* p, I v) { _mm512_storeu_si512(p, (__m512i)v); }
  static __m512i no_codes() { return _mm512_setzero_si512(); }
  static void add_codes(__m512i& sum, I words) {
    sum = _mm512_add_epi64(sum, _mm512_sad_epu8((__m512i)words, _mm512_setzero_si512()));
  }
  static int64_t total_codes(__m512i sum) { return _mm512_reduce_add_epi64(sum); }
};

}  // namespace

const SoftmaxFunctions kSoftmaxAvx512 = {
    {softmax<Lanes, Product::int8>, softmax<Lanes, Product::bf16>, softmax<Lanes, Product::f32>}};

}  // namespace rfk
#endif
