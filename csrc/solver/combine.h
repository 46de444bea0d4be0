#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/rows.h"
#include "noise/philox.h"

#ifdef __CUDACC__
#define RFK_UNROLL _Pragma("unroll")
#else
#define RFK_UNROLL
#endif

// What the back ends of combine and moments share: a call as plain numbers, and the maths of guides.
//
//   o_j = sum_k c_jk y_k + c_jg g + c_jz z
//
// A guided velocity g is itself a combination of the tensors, sum_k f_k y_k, with factors f that may depend
// on products of the tensors: it is never formed, c_jk takes c_jg f_k.

namespace rfk {

inline constexpr int kMaxInputs = 8, kMaxOutputs = 3;
inline constexpr int kGuided = 4;    // the tensors 0 .. 3 may be combined by a guide
inline constexpr int kProducts = 5;  // of a guide's two combinations p, q: sums of p, q, pp, pq, qq

// The sums of that many combinations and of their products.
RFK_HD constexpr int moments_of(int combinations) {
  return combinations + combinations * (combinations + 1) / 2;
}
inline constexpr int kMaxMoments = moments_of(kMaxOutputs);

enum class Guide : uint8_t {
  none,
  cfg,
  skip_layer,
  zero_star,
  rescale,
  apg,
  apg_momentum,
  perpendicular,
  token_norm,
  transport,
  transport_matched,
};

struct GuideKind {
  const char* name;
  Guide guide;
  int velocities, params;
};

inline constexpr GuideKind kGuides[] = {
    {"cfg", Guide::cfg, 2, 1},
    {"skip_layer", Guide::skip_layer, 3, 2},
    {"zero_star", Guide::zero_star, 2, 1},
    {"rescale", Guide::rescale, 2, 2},
    {"apg", Guide::apg, 2, 3},
    {"apg_momentum", Guide::apg_momentum, 3, 4},
    {"perpendicular", Guide::perpendicular, 3, 2},
    {"token_norm", Guide::token_norm, 2, 1},
    {"transport", Guide::transport, 2, 3},
    {"transport_matched", Guide::transport_matched, 2, 3},
};

// Its products are sums over a row along the last axis, or over a sample.
RFK_HD bool per_token(Guide g) { return g >= Guide::token_norm; }
RFK_HD bool per_sample(Guide g) { return Guide::zero_star <= g && g <= Guide::perpendicular; }

// The tensors that a guide combines: first .. last.
RFK_HD int guide_first(Guide g) { return g >= Guide::transport ? 0 : 1; }
RFK_HD int guide_last(Guide g) {
  const bool third = g == Guide::skip_layer || g == Guide::apg_momentum || g == Guide::perpendicular;
  return third ? 4 : 3;
}

// A tensor of any floating dtype: f64, or one of those whose values are made float.
struct AnyFloats {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// Row scalars [outputs, columns, *rows], of the step that the call is at.
template <typename A> struct CoefTable {
  const A* data = nullptr;
  int64_t step = 0, output = 0, column = 0, row[kRowAxes] = {};

  RFK_HD const A* at(RowIndex r, int64_t now) const {
    int64_t offset = now * step;
    for (int a = 0; a < kRowAxes; ++a) offset += r.i[a] * row[a];
    return data + offset;
  }
  RFK_HD A get(const A* at, int j, int k) const { return at[j * output + k * column]; }
};

// A guide and its parameters, [params] or [params, batch], of the step that the call is at.
template <typename A> struct Guidance {
  Guide guide = Guide::none;
  const A* data = nullptr;
  int64_t step = 0, param = 0, sample = 0;

  RFK_HD A get(int p, int64_t of, int64_t now) const { return data[now * step + p * param + of * sample]; }
};

template <typename A> struct CombineArgs {
  RowPlan plan;                     // of one tensor by its row scalars
  int64_t samples, size;            // size: elements of a sample
  int64_t width;                    // of the last axis
  int inputs, outputs, noise = -1;  // noise: its column
  AnyFloats in[kMaxInputs], mask;
  DType state;
  void* out[kMaxOutputs];
  CoefTable<A> coefs, inside;
  Guidance<A> guidance;
  NoiseKeys keys{};
  const int64_t* step = nullptr;
  int64_t chunk, chunks;  // elements whose products are summed by one block, and how many chunks a sample has
  double* partials = nullptr;  // [samples, chunks, kProducts or moments]
  bool residuals = false;      // also the moments of the result less the combination without noise
  double* sums = nullptr;      // [samples, moments]
};

// Elements of a chunk: at most 128 chunks a sample, so that every block can sum them up.
inline int64_t chunk_of(int64_t size) {
  constexpr int64_t kLeast = 8192, kMost = 128, kUnit = 1024;
  return std::max(kLeast, (size + kMost * kUnit - 1) / (kMost * kUnit) * kUnit);
}

// The two combinations of tensors 0 .. 3 whose products a guide needs.
template <typename A> struct GuideBasis {
  A c[2][kGuided] = {};
};

template <typename A> RFK_HD GuideBasis<A> guide_basis(const Guidance<A>& g, int64_t sample, int64_t now) {
  GuideBasis<A> b;
  switch (g.guide) {
    case Guide::zero_star:  // u, c
      b.c[0][1] = b.c[1][2] = 1;
      break;
    case Guide::rescale:  // c, g
    case Guide::token_norm:
      b.c[0][2] = 1;
      b.c[1][1] = 1 - g.get(0, sample, now);
      b.c[1][2] = g.get(0, sample, now);
      break;
    case Guide::apg_momentum:  // d, c
      b.c[0][3] = g.get(3, sample, now);
      [[fallthrough]];
    case Guide::apg:
      b.c[0][1] = -1;
      b.c[0][2] = b.c[1][2] = 1;
      break;
    case Guide::perpendicular:  // p, q
      b.c[0][1] = b.c[1][1] = -1;
      b.c[0][2] = b.c[1][3] = 1;
      break;
    case Guide::transport:  // d, v
    case Guide::transport_matched:
      b.c[0][0] = g.get(1, sample, now);
      b.c[0][2] = -b.c[0][0];
      b.c[1][1] = 1;
      break;
    default: break;
  }
  return b;
}

// Where moments finds the coefficients of its combinations: in the table of the call,
template <typename A> struct TableCoefs {
  RFK_HD int count(const CombineArgs<A>& args) const { return args.outputs; }
  RFK_HD int first(const CombineArgs<A>&) const { return 0; }
  RFK_HD int last(const CombineArgs<A>& args) const { return args.inputs; }
  RFK_HD void read(const CombineArgs<A>& args, int64_t row, A (&c)[kMaxOutputs][kMaxInputs]) const {
    const A* at = args.coefs.at(args.plan.index(row), 0);
    RFK_UNROLL
    for (int j = 0; j < kMaxOutputs; ++j) RFK_UNROLL
    for (int k = 0; k < kMaxInputs; ++k)
      c[j][k] = j < args.outputs && k < args.inputs ? args.coefs.get(at, j, k) : A(0);
  }
};

// or in what a guide needs, the same for every row of a sample.
template <typename A> struct BasisCoefs {
  GuideBasis<A> basis;
  RFK_HD int count(const CombineArgs<A>&) const { return 2; }
  RFK_HD int first(const CombineArgs<A>& args) const { return guide_first(args.guidance.guide); }
  RFK_HD int last(const CombineArgs<A>& args) const { return guide_last(args.guidance.guide); }
  RFK_HD void read(const CombineArgs<A>&, int64_t, A (&c)[kMaxOutputs][kMaxInputs]) const {
    RFK_UNROLL
    for (int j = 0; j < 2; ++j) RFK_UNROLL
    for (int k = 0; k < kGuided; ++k) c[j][k] = basis.c[j][k];
  }
};

// A guided velocity as a combination of tensors 0 .. 3.
template <typename A> struct GuideFactors {
  A f[kGuided] = {};
};

namespace detail {
RFK_HD double ratio(double a, double b) { return b == 0 ? 0 : a / b; }
// What shortens a vector of that squared norm to at most r.
RFK_HD double clip(double r, double square) { return square > r * r ? r / std::sqrt(square) : 1; }
}  // namespace detail

// `m`: sums of p, q, then of pp, pq, qq over `count` elements.
template <typename A>
RFK_HD GuideFactors<A> guide_factors(const Guidance<A>& g, const double (&m)[kProducts], int64_t count,
                                     int64_t sample, int64_t now) {
  GuideFactors<A> result;
  if (g.guide == Guide::none) return result;
  const double pp = m[2], pq = m[3], qq = m[4], w = double(g.get(0, sample, now));
  const auto param = [&](int p) { return double(g.get(p, sample, now)); };
  double x = 0, u = 1 - w, c = w, third = 0;  // of tensors 0 .. 3
  switch (g.guide) {
    case Guide::skip_layer: c += param(1), third = -param(1); break;
    case Guide::zero_star: u *= pq / (pp + 1e-8); break;
    case Guide::rescale: {
      const double n = double(count), of_c = pp - m[0] * m[0] / n, of_g = qq - m[1] * m[1] / n;
      const double stds = count > 1 ? std::sqrt(detail::ratio(of_c > 0 ? of_c : 0, of_g > 0 ? of_g : 0)) : 0;
      const double scale = param(1) * stds + 1 - param(1);
      u *= scale, c *= scale;
      break;
    }
    case Guide::apg:
    case Guide::apg_momentum: {
      const double s = w * detail::clip(param(2), pp);
      u = 1 - s, c = s * (1 - (1 - param(1)) * detail::ratio(pq, qq));
      if (g.guide == Guide::apg_momentum) third = s * param(3);
      break;
    }
    case Guide::perpendicular:
      c = w * (1 + param(1) * detail::ratio(pq, pp)), third = -w * param(1);
      u = 1 - c - third;
      break;
    case Guide::token_norm: {
      const double scale = std::sqrt(detail::ratio(pp, qq));
      u *= scale, c *= scale;
      break;
    }
    case Guide::transport:
    case Guide::transport_matched: {
      const bool matched = g.guide == Guide::transport_matched;
      const double scale = matched ? std::sqrt(detail::ratio(qq, pp)) : detail::clip(param(2), pp);
      x = w * scale * param(1), c = -x;
      break;
    }
    default: break;
  }
  result.f[0] = A(x), result.f[1] = A(u), result.f[2] = A(c), result.f[3] = A(third);
  return result;
}

// What the tensors and the noise of one row are multiplied by.
template <typename A> struct Weights {
  A c[kMaxOutputs][kMaxInputs], z[kMaxOutputs];
};

template <typename A>
RFK_HD void read_weights(Weights<A>& w, const CombineArgs<A>& args, const CoefTable<A>& table, RowIndex row,
                         int64_t now, const GuideFactors<A>& factors) {
  const A* at = table.at(row, now);
  const bool guided = args.guidance.guide != Guide::none;
  RFK_UNROLL
  for (int j = 0; j < kMaxOutputs; ++j) {
    if (j >= args.outputs) continue;
    const A g = guided ? table.get(at, j, args.inputs) : A(0);
    RFK_UNROLL
    for (int k = 0; k < kMaxInputs; ++k) {
      if (k >= args.inputs) continue;
      w.c[j][k] = table.get(at, j, k);
      if (guided && k < kGuided) w.c[j][k] += g * factors.f[k < kGuided ? k : 0];
    }
    w.z[j] = args.noise >= 0 ? table.get(at, j, args.noise) : A(0);
  }
}

template <typename A> RFK_HD int64_t step_of(const CombineArgs<A>& args) {
  return args.step ? *args.step : 0;
}

template <typename A> RFK_HD NoiseKey key_of(const CombineArgs<A>& args, int64_t sample, int64_t now) {
  NoiseKey key = args.keys.of(sample);
  key.step += uint32_t(now);
  return key;
}

// The back ends, for A float and double, on calls that have been checked.
template <typename A> void combine_cpu(const CombineArgs<A>& args);
template <typename A> void combine_cuda(Stream stream, int device, const CombineArgs<A>& args);
template <typename A> void moments_cpu(const CombineArgs<A>& args);
template <typename A> void moments_cuda(Stream stream, int device, const CombineArgs<A>& args);
template <typename A> void stochastic_step_cpu(const CombineArgs<A>& args);
template <typename A> void stochastic_step_cuda(Stream stream, int device, const CombineArgs<A>& args);

}  // namespace rfk
