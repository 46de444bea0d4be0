#include "attention/softmax_vectors.h"

namespace rfk {
namespace {

using Floats __attribute__((vector_size(16))) = float;
using Integers __attribute__((vector_size(16))) = int32_t;

struct Lanes : VectorLanes<Floats, Integers> {
  static V fma(V a, V b, V c) { return a * b + c; }
};

struct Double {
  using V = double;
  using Word = double;
  static constexpr int kLanes = 1;
  static constexpr bool kExact = true;
  static V load(const double* p) { return *p; }
  static void store(double* p, V v) { *p = v; }
  static V set(double v) { return v; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V first(V v, int count) { return count > 0 ? v : -std::numeric_limits<double>::infinity(); }
  static V if_equal(V a, V b, V then, V otherwise) { return a == b ? then : otherwise; }
  static V exp2(V x) { return std::exp2(x); }
  static double top(V v) { return v; }
  static double total(V v) { return v; }
};

}  // namespace

const SoftmaxFunctions kSoftmaxGeneric = {
    {softmax<Lanes, Product::int8>, nullptr, softmax<Lanes, Product::f32>}};

void softmax_f64(const SoftmaxTile<double>& tile) { softmax<Double, Product::f64>(tile); }

}  // namespace rfk
