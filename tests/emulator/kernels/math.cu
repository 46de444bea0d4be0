#include "kernels/math.h"

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "core/activation.h"
#include "core/launch.cuh"

namespace rfk::test {
namespace {

constexpr const char* kFunctions[] = {"exp", "tanh", "sigmoid", "cdf", "density", "log", "sine", "cosine"};

template <typename A> __global__ void math_kernel(A* y, const A* x, int64_t n, int function) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  switch (function) {
    case 0: y[i] = exp_(x[i]); break;
    case 1: y[i] = tanh_(x[i]); break;
    case 2: y[i] = sigmoid(x[i]); break;
    case 3: y[i] = normal(x[i]).cdf; break;
    case 4: y[i] = normal(x[i]).density; break;
    case 5: y[i] = log_(x[i]); break;
    default:
      if constexpr (std::is_same_v<A, float>)
        y[i] = function == 6 ? sin_cos(x[i]).sine : sin_cos(x[i]).cosine;
  }
}

template <typename A> __global__ void activation_grad_kernel(A* y, const A* x, int64_t n, Activation kind) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = activate_grad(kind, x[i]);
}

// Calls f(y, x) with pointers to float or double.
template <typename F> void with_floats(const TensorView& y, const TensorView& x, F&& f) {
  if (x.dtype == DType::f64)
    f(y.ptr<double>(), x.ptr<const double>());
  else
    f(y.ptr<float>(), x.ptr<const float>());
}

dim3 blocks_of(const TensorView& x) { return dim3(unsigned((x.numel() + 255) / 256)); }

}  // namespace

void math(Stream stream, const TensorView& y, const TensorView& x, const std::string& function) {
  const auto found = std::find(std::begin(kFunctions), std::end(kFunctions), function);
  check(found != std::end(kFunctions), "math: no function ", function);
  const int number = int(found - kFunctions);
  with_floats(y, x, [&]<typename A>(A* to, const A* from) {
    launch("math", math_kernel<A>, blocks_of(x), dim3(256), 0, cudaStream_t(stream), to, from, x.numel(),
           number);
  });
}

void activation_grad(Stream stream, const TensorView& y, const TensorView& x, const std::string& kind) {
  dispatch_activation("activation_grad", kind, [&](auto k) {
    with_floats(y, x, [&]<typename A>(A* to, const A* from) {
      launch("activation_grad", activation_grad_kernel<A>, blocks_of(x), dim3(256), 0, cudaStream_t(stream),
             to, from, x.numel(), Activation(k));
    });
  });
}

}  // namespace rfk::test
