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
};

}  // namespace

const SoftmaxFunctions kSoftmaxAvx2 = {{softmax<Lanes, Product::int8>, nullptr, softmax<Lanes, Product::f32>}};

}  // namespace rfk
#endif
