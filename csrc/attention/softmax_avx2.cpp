#ifdef __x86_64__
#include <immintrin.h>

#include "attention/softmax.h"

#pragma GCC target("avx2,fma")
#include "attention/softmax_vectors.h"

namespace rfk {
namespace {

using Floats __attribute__((vector_size(32))) = float;
using Integers __attribute__((vector_size(32))) = int32_t;

struct Lanes : VectorLanes<Floats, Integers> {
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static void store_codes(uint8_t* p, V code) {
    const __m256i bytes = _mm256_and_si256(_mm256_castps_si256(code), _mm256_set1_epi32(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
};

}  // namespace

const SoftmaxFunctions kSoftmaxAvx2 = {{softmax<Lanes, Product::int8>, nullptr, softmax<Lanes, Product::f32>}};

}  // namespace rfk
#endif
