#pragma once

#include <cmath>

#include "core/dtype.h"

// The maths of one head vector x [d], shared by the CPU and CUDA.
//
//   n = x / sqrt(mean(x^2) + eps) * w                      RMS norm, where there is a weight w [d]; or, with
//                                                          w [heads d], the mean is over all heads of a token
//   y[2j], y[2j+1] = R(angle_j) (n[2j], n[2j+1])           rotation of interleaved pairs
//
// and its gradient (means over the same elements): with g[2j], g[2j+1] = R(-angle_j) (dy[2j], dy[2j+1]), u =
// g w and x^ = x / rms,
//
//   dx = (u - x^ mean(u x^)) / rms,  dw = sum of g x^ over the vectors or tokens.

namespace rfk {

inline constexpr int kMaxHeadDim = 256;

// Where the norm rounds. exact: as torch.nn.RMSNorm, to the dtype of the tokens after the weight.
// exact_before_weight: as diffusers' RMSNorm, to the dtype of the weight, before it and after it.
enum class Tier : int { fast, exact, exact_before_weight };

template <typename S, typename A> RFK_HD A rounded(A v) { return load(store<S>(v)); }

template <typename A> RFK_HD A inverse_rms(A sum_of_squares, int d, A eps) {
  return 1 / std::sqrt(sum_of_squares / A(d) + eps);
}

// n of one element; T: dtype of the tokens, M: of the weights.
template <typename T, typename M>
RFK_HD acc_t<T> normalise(acc_t<T> x, acc_t<T> inv_rms, acc_t<T> w, Tier tier) {
  acc_t<T> n = x * inv_rms;
  if (tier == Tier::exact_before_weight) n = rounded<M>(n);
  n *= w;
  if (tier == Tier::exact) n = rounded<T>(n);
  if (tier == Tier::exact_before_weight) n = rounded<M>(n);
  return n;
}

// y of one element of a pair from itself and the other one; sin is negative for the first of the pair.
template <typename A> RFK_HD A rotate(A own, A other, A cos, A sin) { return own * cos + other * sin; }

// The sign of the angle: the gradient turns back.
enum class Turn : int { forth, back };

// dx of one element; mean: of u x^ over the vector.
template <typename A> RFK_HD A norm_backward(A u, A x_hat, A inv_rms, A mean) {
  return inv_rms * (u - x_hat * mean);
}

}  // namespace rfk
