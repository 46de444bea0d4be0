#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/map_vectors_cpu.h"
#include "core/stream_store.h"
#include "noise/noise_rows_cpu.h"
#include "solver/combine.h"

// Strip by strip: every tensor is read once and widened, the combinations are made column by column in the
// innermost cache, and the results rounded and stored behind the last reading of the strip, so that a result
// may lie where a tensor did.

namespace rfk {
namespace {

constexpr int64_t kStrip = 512, kBlock = 4096;  // elements of a strip, and of a task
constexpr int kLanes = 16;                 // of sums in double: their order is that of every instruction set
constexpr int kMaxTerms = kMaxInputs + 1;  // tensors and noise

template <typename A> struct Strip {
  alignas(64) A wide[kMaxTerms][kStrip], mask[kStrip], result[kMaxOutputs][kStrip];
  const A* column[kMaxTerms];
};

template <typename A> RFK_HD const A* widen_any(A* buffer, AnyFloats from, int64_t at, int64_t count) {
  if (from.dtype == DType::bf16) return widen(buffer, static_cast<const bf16*>(from.data) + at, count);
  if (from.dtype == DType::f16) return widen(buffer, static_cast<const f16*>(from.data) + at, count);
  return static_cast<const A*>(from.data) + at;
}

// to[i] = sum_k c_k y_k[i], from left to right; with a mask m c_k is c_k + m[i] (d_k - c_k).
template <int K, bool kMasked, typename A>
RFK_HD void sum_columns(A* to, const A* const* y, const A* c, const A* d, const A* m, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const auto weight = [&](int k) { return kMasked ? c[k] + m[i] * (d[k] - c[k]) : c[k]; };
    A sum = weight(0) * y[0][i];
    for (int k = 1; k < K; ++k) sum += weight(k) * y[k][i];
    to[i] = sum;
  }
}

template <bool kMasked, typename A>
RFK_HD void sum_columns(int terms, A* to, const A* const* y, const A* c, const A* d, const A* m,
                        int64_t count) {
  switch (terms) {
    case 1: return sum_columns<1, kMasked>(to, y, c, d, m, count);
    case 2: return sum_columns<2, kMasked>(to, y, c, d, m, count);
    case 3: return sum_columns<3, kMasked>(to, y, c, d, m, count);
    case 4: return sum_columns<4, kMasked>(to, y, c, d, m, count);
    case 5: return sum_columns<5, kMasked>(to, y, c, d, m, count);
    case 6: return sum_columns<6, kMasked>(to, y, c, d, m, count);
    case 7: return sum_columns<7, kMasked>(to, y, c, d, m, count);
    case 8: return sum_columns<8, kMasked>(to, y, c, d, m, count);
    default: return sum_columns<9, kMasked>(to, y, c, d, m, count);
  }
}

// Columns `first` .. `last` of `count` elements.
template <typename A>
RFK_HD void load_strip(Strip<A>& s, const CombineArgs<A>& args, int first, int last, int64_t at,
                       int64_t count) {
  for (int k = first; k < last; ++k) s.column[k] = widen_any(s.wide[k], args.in[k], at, count);
}

// Normal noise for elements at .. at + count of a sample, `at` a multiple of four or in the middle of a
// block.
template <typename A> RFK_HD void draw_strip(A* to, const NoiseKey& key, int64_t at, int64_t count) {
  constexpr int64_t kDraws = kNoiseBlocks * kDrawsPerBlock;
  static_assert(kStrip + kDrawsPerBlock <= kDraws);
  float z[kDraws];
  const int64_t first = at / kDrawsPerBlock, skip = at % kDrawsPerBlock;
  fill_draws(key, first, int((skip + count + kDrawsPerBlock - 1) / kDrawsPerBlock), z);
  for (int64_t i = 0; i < count; ++i) to[i] = A(z[skip + i]);
}

enum class Place { through_cache, past_cache };

template <typename T> RFK_HD void put(T* to, const T* from, int64_t count, Place place) {
  if (place == Place::past_cache && reinterpret_cast<uintptr_t>(to) % 16 == 0)
    stream_store(to, from, count * int64_t(sizeof(T)));
  else
    std::memcpy(to, from, count * sizeof(T));
}

template <typename T, typename A>
RFK_HD void put_narrow(void* out, int64_t at, const A* from, int64_t count, Place place) {
  alignas(64) T buffer[kStrip];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffer[i] = store<T>(from[i]);
  put(static_cast<T*>(out) + at, buffer, count, place);
}

template <typename A>
RFK_HD void store_strip(const Strip<A>& s, const CombineArgs<A>& args, int64_t at, int64_t count,
                        Place place) {
  for (int j = 0; j < args.outputs; ++j) {
    if constexpr (sizeof(A) == 4) {
      if (args.state == DType::bf16) {
        put_narrow<bf16>(args.out[j], at, s.result[j], count, place);
        continue;
      }
      if (args.state == DType::f16) {
        put_narrow<f16>(args.out[j], at, s.result[j], count, place);
        continue;
      }
    }
    put(static_cast<A*>(args.out[j]) + at, s.result[j], count, place);
  }
}

// Elements `from` .. `to` of the strip, which lie in one row.
template <typename A>
RFK_HD void combine_row(Strip<A>& s, const CombineArgs<A>& args, int64_t row, int64_t from, int64_t to,
                        int64_t now, const GuideFactors<A>& factors) {
  const RowIndex index = args.plan.index(row);
  Weights<A> w, inside;
  read_weights(w, args, args.coefs, index, now, factors);
  if (args.mask.data) read_weights(inside, args, args.inside, index, now, factors);
  const int terms = args.inputs + (args.noise >= 0 ? 1 : 0);
  const A *y[kMaxTerms] = {}, *mask = s.column[0];
  for (int k = 0; k < terms; ++k) y[k] = s.column[k] + from;
  if (args.residuals) sum_columns<false>(args.inputs, s.result[1] + from, y, w.c[0], w.c[0], mask, to - from);
  for (int j = 0; j < args.outputs; ++j) {
    A c[kMaxTerms], d[kMaxTerms];
    for (int k = 0; k < args.inputs; ++k) c[k] = w.c[j][k];
    c[args.inputs] = w.z[j];
    if (args.mask.data) {
      for (int k = 0; k < args.inputs; ++k) d[k] = inside.c[j][k];
      d[args.inputs] = inside.z[j];
      sum_columns<true>(terms, s.result[j] + from, y, c, d, s.mask + from, to - from);
    } else {
      sum_columns<false>(terms, s.result[j] + from, y, c, c, mask, to - from);
    }
  }
}

// lanes[m][i % kLanes] += o_0[i], ..., then the products in the order of an upper triangle.
template <int J, typename A>
RFK_HD void add_moments(double (&lanes)[kMaxMoments][kLanes], const A (&o)[kMaxOutputs][kStrip],
                        int64_t count) {
  const auto add = [&](int64_t at, int l) {
    double v[J];
    for (int j = 0; j < J; ++j) lanes[j][l] += v[j] = double(o[j][at + l]);
    int m = J;
    for (int i = 0; i < J; ++i)
      for (int j = i; j < J; ++j) lanes[m++][l] += v[i] * v[j];
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) add(at, l);
  }
  for (int l = 0; at + l < count; ++l) add(at, l);
}

RFK_HD void add_lanes(const double (&lanes)[kMaxMoments][kLanes], int moments, double* sums) {
  for (int m = 0; m < moments; ++m) {
    sums[m] = 0;
    for (double lane : lanes[m]) sums[m] += lane;
  }
}

// What is behind the stored values of a strip, as the next reader sees them: result[0] less result[1].
template <typename A> RFK_HD void make_residuals(Strip<A>& s, const CombineArgs<A>& args, int64_t count) {
  const bool brain = args.state == DType::bf16, half = args.state == DType::f16;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A v = s.result[0][i];
    if constexpr (sizeof(A) == 4) v = brain ? rounded_to<bf16>(v) : half ? rounded_to<f16>(v) : v;
    s.result[0][i] = -s.result[1][i] + v;
  }
}

// Elements begin .. end of a sample; with residuals their sum and that of their squares go to `sums`.
template <typename A>
RFK_SIMD void combine_span(const CombineArgs<A>& args, int64_t sample, int64_t begin, int64_t end,
                           int64_t now, GuideFactors<A> factors, Place place, double* sums = nullptr) {
  Strip<A> s;
  alignas(64) double lanes[kMaxMoments][kLanes] = {};
  for (int64_t at = begin; at < end; at += kStrip) {
    const int64_t count = std::min(kStrip, end - at), first = sample * args.size + at;
    load_strip(s, args, 0, args.inputs, first, count);
    if (args.noise >= 0) {
      draw_strip(s.wide[args.inputs], key_of(args, sample, now), at, count);
      s.column[args.inputs] = s.wide[args.inputs];
    }
    if (args.mask.data) {
      const A* mask = widen_any(s.mask, args.mask, first, count);
      if (mask != s.mask) std::memcpy(s.mask, mask, count * sizeof(A));
    }
    for (int64_t from = 0; from < count;) {
      const int64_t row = (first + from) / args.plan.cols;
      const int64_t to = std::min(count, (row + 1) * args.plan.cols - first);
      combine_row(s, args, row, from, to, now, factors);
      from = to;
    }
    store_strip(s, args, first, count, place);
    if (args.residuals) {
      make_residuals(s, args, count);
      add_moments<1>(lanes, s.result, count);
    }
  }
  if (place == Place::past_cache) stream_fence();
  if (args.residuals) add_lanes(lanes, 2, sums);
}

// The sums of combinations over elements begin .. end of a sample, and those of their products. `coefs`: of
// tensors first() .. last(), which a row's are read from.
template <typename A, typename Coefs>
RFK_HD void moments_span(const CombineArgs<A>& args, const Coefs& coefs, int64_t sample, int64_t begin,
                         int64_t end, double* sums) {
  Strip<A> s;
  alignas(64) double lanes[kMaxMoments][kLanes] = {};
  const int combinations = coefs.count(args), base = coefs.first(args), terms = coefs.last(args) - base;
  for (int64_t at = begin; at < end; at += kStrip) {
    const int64_t count = std::min(kStrip, end - at), first = sample * args.size + at;
    load_strip(s, args, base, base + terms, first, count);
    for (int64_t from = 0; from < count;) {
      const int64_t row = (first + from) / args.plan.cols;
      const int64_t to = std::min(count, (row + 1) * args.plan.cols - first);
      A c[kMaxOutputs][kMaxInputs];
      coefs.read(args, row, c);
      const A* y[kMaxTerms] = {};
      for (int k = 0; k < terms; ++k) y[k] = s.column[base + k] + from;
      for (int j = 0; j < combinations; ++j)
        sum_columns<false>(terms, s.result[j] + from, y, c[j] + base, c[j], y[0], to - from);
      from = to;
    }
    if (combinations == 1)
      add_moments<1>(lanes, s.result, count);
    else if (combinations == 2)
      add_moments<2>(lanes, s.result, count);
    else
      add_moments<3>(lanes, s.result, count);
  }
  add_lanes(lanes, moments_of(combinations), sums);
}

template <typename A>
RFK_SIMD void table_moments(const CombineArgs<A>& args, int64_t sample, int64_t begin, int64_t end,
                            double* sums) {
  moments_span(args, TableCoefs<A>{}, sample, begin, end, sums);
}

template <typename A>
RFK_SIMD void basis_moments(const CombineArgs<A>& args, int64_t sample, int64_t begin, int64_t end,
                            const GuideBasis<A>& basis, double* sums) {
  moments_span(args, BasisCoefs<A>{basis}, sample, begin, end, sums);
}

// Calls f(sample, chunk, begin, end) for every chunk, on all threads.
template <typename A, typename F> void each_chunk(const CombineArgs<A>& args, F&& f) {
#pragma omp parallel for schedule(static) if (args.samples * args.size > 8 * kBlock)
  for (int64_t task = 0; task < args.samples * args.chunks; ++task) {
    const int64_t begin = task % args.chunks * args.chunk;
    f(task / args.chunks, task % args.chunks, begin, std::min(begin + args.chunk, args.size));
  }
}

// The sums of a sample's chunks, in order.
void add_chunks(const double* partials, int64_t chunks, int moments, double* sums) {
  double total[kMaxMoments] = {};
  for (int64_t c = 0; c < chunks; ++c)
    for (int m = 0; m < moments; ++m) total[m] += partials[c * moments + m];
  std::copy(total, total + moments, sums);
}

// The products that a guide needs of every sample, in place of those of its first chunk.
template <typename A> void sum_products(const CombineArgs<A>& args, int64_t now) {
  each_chunk(args, [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end) {
    basis_moments(args, sample, begin, end, guide_basis(args.guidance, sample, now),
                  args.partials + (sample * args.chunks + chunk) * kProducts);
  });
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    double* partials = args.partials + sample * args.chunks * kProducts;
    add_chunks(partials, args.chunks, kProducts, partials);
  }
}

template <typename A> Place place_of(const CombineArgs<A>& args) {
  const int64_t bytes = args.samples * args.size * size_of(args.state);
  bool past = true;
  for (int j = 0; j < args.outputs; ++j) {
    past &= should_stream(args.out[j], bytes) && args.out[j] != args.mask.data;
    for (int k = 0; k < args.inputs; ++k) past &= args.out[j] != args.in[k].data;
  }
  return past ? Place::past_cache : Place::through_cache;
}

// Whole rows along the last axis, each with factors of its own.
template <typename A>
void combine_tokens(const CombineArgs<A>& args, int64_t sample, int64_t begin, int64_t end, int64_t now,
                    Place place) {
  const GuideBasis<A> basis = guide_basis(args.guidance, sample, now);
  for (int64_t at = begin; at < end; at += args.width) {
    double sums[kMaxMoments];
    basis_moments(args, sample, at, at + args.width, basis, sums);
    const double products[kProducts] = {sums[0], sums[1], sums[2], sums[3], sums[4]};
    const auto factors = guide_factors(args.guidance, products, args.width, sample, now);
    combine_span(args, sample, at, at + args.width, now, factors, place);
  }
}

}  // namespace

template <typename A> void combine_cpu(const CombineArgs<A>& args) {
  const Place place = place_of(args);
  const int64_t now = step_of(args);
  const bool tokens = per_token(args.guidance.guide), summed = per_sample(args.guidance.guide);
  if (summed) sum_products(args, now);
  const int64_t block = tokens ? std::max<int64_t>(1, kBlock / args.width) * args.width : kBlock;
  const int64_t blocks = (args.size + block - 1) / block;
#pragma omp parallel for schedule(static) if (args.samples * args.size > 8 * kBlock)
  for (int64_t task = 0; task < args.samples * blocks; ++task) {
    const int64_t sample = task / blocks, begin = task % blocks * block;
    const int64_t end = std::min(begin + block, args.size);
    if (tokens) {
      combine_tokens(args, sample, begin, end, now, place);
      continue;
    }
    double products[kProducts] = {};
    if (summed) std::copy_n(args.partials + sample * args.chunks * kProducts, kProducts, products);
    combine_span(args, sample, begin, end, now,
                 guide_factors(args.guidance, products, args.size, sample, now), place);
  }
}

template <typename A> void moments_cpu(const CombineArgs<A>& args) {
  const int moments = moments_of(args.outputs);
  each_chunk(args, [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end) {
    table_moments(args, sample, begin, end, args.partials + (sample * args.chunks + chunk) * moments);
  });
  for (int64_t sample = 0; sample < args.samples; ++sample)
    add_chunks(args.partials + sample * args.chunks * moments, args.chunks, moments,
               args.sums + sample * moments);
}

template <typename A> void stochastic_step_cpu(const CombineArgs<A>& args) {
  const Place place = place_of(args);
  const int64_t now = step_of(args);
  each_chunk(args, [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end) {
    combine_span(args, sample, begin, end, now, {}, place,
                 args.partials + (sample * args.chunks + chunk) * moments_of(1));
  });
  for (int64_t sample = 0; sample < args.samples; ++sample)
    add_chunks(args.partials + sample * args.chunks * moments_of(1), args.chunks, moments_of(1),
               args.sums + sample * moments_of(1));
}

template void combine_cpu<float>(const CombineArgs<float>&);
template void combine_cpu<double>(const CombineArgs<double>&);
template void moments_cpu<float>(const CombineArgs<float>&);
template void moments_cpu<double>(const CombineArgs<double>&);
template void stochastic_step_cpu<float>(const CombineArgs<float>&);
template void stochastic_step_cpu<double>(const CombineArgs<double>&);

}  // namespace rfk
