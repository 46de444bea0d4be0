#include "solver/combine_strip.h"

namespace rfk {
namespace {

enum class Place { through_cache, past_cache };

// How the strips of a call are made: what differs from call to call and not within one.
struct Route {
  Place place;
  bool in_place;  // the only result is written where it goes
  DType mixed;  // the dtype of all tensors after the first, bf16 or f16, that are widened in the sum; or f32
};

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
    if (sizeof(A) == 4 && args.state == DType::bf16)
      put_narrow<bf16>(args.out[j], at, s.result[j], count, place);
    else if (sizeof(A) == 4 && args.state == DType::f16)
      put_narrow<f16>(args.out[j], at, s.result[j], count, place);
    else
      put(static_cast<A*>(args.out[j]) + at, s.result[j], count, place);
  }
}

// sum_columns of a wide column and 16-bit ones from element `at` on.
template <int K, typename V, typename A>
RFK_HD void sum_mixed(A* to, const CombineArgs<A>& args, int64_t at, const A* c, int64_t count) {
  const A* first = static_cast<const A*>(args.in[0].data) + at;
  const V* rest[K > 1 ? K - 1 : 1] = {};
  for (int k = 1; k < K; ++k) rest[k - 1] = static_cast<const V*>(args.in[k].data) + at;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A sum = c[0] * first[i];
    for (int k = 1; k < K; ++k) sum += c[k] * A(load(rest[k - 1][i]));
    to[i] = sum;
  }
}

template <typename V, typename A>
RFK_HD void sum_mixed(A* to, const CombineArgs<A>& args, int64_t at, const A* c, int64_t count) {
  switch (args.inputs) {
    case 2: return sum_mixed<2, V>(to, args, at, c, count);
    case 3: return sum_mixed<3, V>(to, args, at, c, count);
    case 4: return sum_mixed<4, V>(to, args, at, c, count);
    case 5: return sum_mixed<5, V>(to, args, at, c, count);
    case 6: return sum_mixed<6, V>(to, args, at, c, count);
    case 7: return sum_mixed<7, V>(to, args, at, c, count);
    default: return sum_mixed<8, V>(to, args, at, c, count);
  }
}

// Elements `from` .. `to` of the strip that begins at element `first`, which lie in one row.
template <typename A>
RFK_HD void combine_row(Strip<A>& s, const CombineArgs<A>& args, const Route& route, int64_t row,
                        int64_t first, int64_t from, int64_t to, int64_t now,
                        const GuideFactors<A>& factors) {
  if (row != s.row) {
    const RowIndex index = args.plan.index(s.row = row);
    read_weights(s.weights, args, args.coefs, index, now, factors);
    if (args.mask.data) read_weights(s.inside, args, args.inside, index, now, factors);
  }
  const Weights<A>&w = s.weights, &inside = s.inside;
  const int terms = args.inputs + (args.noise >= 0 ? 1 : 0);
  const A *y[kMaxTerms] = {}, *mask = s.column[0];
  for (int k = 0; k < (route.mixed == DType::f32 ? terms : 1); ++k) y[k] = s.column[k] + from;
  if (args.residuals) sum_columns<false>(args.inputs, s.result[1] + from, y, w.c[0], w.c[0], mask, to - from);
  for (int j = 0; j < args.outputs; ++j) {
    A* out = route.in_place ? static_cast<A*>(args.out[0]) + first : s.result[j];
    A c[kMaxTerms], d[kMaxTerms];
    for (int k = 0; k < args.inputs; ++k) c[k] = w.c[j][k];
    c[args.inputs] = w.z[j];
    if (args.mask.data) {
      for (int k = 0; k < args.inputs; ++k) d[k] = inside.c[j][k];
      d[args.inputs] = inside.z[j];
      sum_columns<true>(terms, out + from, y, c, d, s.mask + from, to - from);
    } else if (route.mixed == DType::bf16) {
      sum_mixed<bf16>(out + from, args, first + from, c, to - from);
    } else if (route.mixed == DType::f16) {
      sum_mixed<f16>(out + from, args, first + from, c, to - from);
    } else {
      sum_columns<false>(terms, out + from, y, c, c, mask, to - from);
    }
  }
}

// Everything that a strip reads.
template <typename A>
RFK_HD void read_strip(Strip<A>& s, const CombineArgs<A>& args, const Route& route, int64_t sample,
                       int64_t at, int64_t count, int64_t now) {
  const int64_t first = sample * args.size + at;
  load_strip(s, args, 0, route.mixed == DType::f32 ? args.inputs : 1, first, count);
  if (args.noise >= 0) {
    draw_strip(s.wide[args.inputs], key_of(args, sample, now), at, count);
    s.column[args.inputs] = s.wide[args.inputs];
  }
  if (args.mask.data) {
    const A* mask = widen_any(s.mask, args.mask, first, count);
    if (mask != s.mask) std::memcpy(s.mask, mask, count * sizeof(A));
  }
}

template <typename A>
RFK_HD void combine_rows(Strip<A>& s, const CombineArgs<A>& args, const Route& route, int64_t first,
                         int64_t from, int64_t end, int64_t now, const GuideFactors<A>& factors) {
  while (from < end) {
    const int64_t row = args.plan.rows == 1 ? 0 : (first + from) / args.plan.cols;
    const int64_t to = std::min(end, (row + 1) * args.plan.cols - first);
    combine_row(s, args, route, row, first, from, to, now, factors);
    from = to;
  }
}

// Elements begin .. end of a sample.
template <typename A>
RFK_SIMD void combine_span(const CombineArgs<A>& args, const Route& route, int64_t sample, int64_t begin,
                           int64_t end, int64_t now, GuideFactors<A> factors) {
  Strip<A> s;
  for (int64_t at = begin; at < end; at += kStrip) {
    const int64_t count = std::min(kStrip, end - at), first = sample * args.size + at;
    read_strip(s, args, route, sample, at, count, now);
    combine_rows(s, args, route, first, 0, count, now, factors);
    if (!route.in_place) store_strip(s, args, first, count, route.place);
  }
  if (route.place == Place::past_cache) stream_fence();
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

// The same for a stochastic step, whose residuals are summed up.
template <typename A>
RFK_SIMD void stochastic_span(const CombineArgs<A>& args, const Route& route, int64_t sample, int64_t begin,
                              int64_t end, int64_t now, double* sums) {
  Strip<A> s;
  Moments<A, 1> moments;
  for (int64_t at = begin; at < end; at += kStrip) {
    const int64_t count = std::min(kStrip, end - at), first = sample * args.size + at;
    read_strip(s, args, route, sample, at, count, now);
    combine_rows(s, args, route, first, 0, count, now, {});
    store_strip(s, args, first, count, route.place);
    make_residuals(s, args, count);
    moments.add(s.result, count);
  }
  moments.finish(sums);
  if (route.place == Place::past_cache) stream_fence();
}

template <typename A>
RFK_SIMD void basis_moments(const CombineArgs<A>& args, int64_t sample, int64_t begin, int64_t end,
                            const GuideBasis<A>& basis, double* sums) {
  moments_span<2>(args, BasisCoefs<A>{basis}, sample, begin, end, sums);
}

// Sums of pp, pq and qq over a row of at most kStrip.
template <typename A>
RFK_HD void row_products(const A* p, const A* q, int64_t count, double (&m)[kProducts]) {
  A pp = 0, pq = 0, qq = 0;
#pragma omp simd reduction(+ : pp, pq, qq)
  for (int64_t i = 0; i < count; ++i) {
    pp += p[i] * p[i];
    pq += p[i] * q[i];
    qq += q[i] * q[i];
  }
  m[2] = double(pp), m[3] = double(pq), m[4] = double(qq);
}

// Whole rows along the last axis of at most kStrip elements, each with factors of its own.
template <typename A>
RFK_SIMD void combine_short_rows(const CombineArgs<A>& args, const Route& route, int64_t sample,
                                 int64_t begin, int64_t end, int64_t now) {
  Strip<A> s;
  const GuideBasis<A> basis = guide_basis(args.guidance, sample, now);
  const int base = guide_first(args.guidance.guide), terms = guide_last(args.guidance.guide) - base;
  const int64_t step = kStrip / args.width * args.width;
  for (int64_t at = begin; at < end; at += step) {
    const int64_t count = std::min(step, end - at), first = sample * args.size + at;
    read_strip(s, args, route, sample, at, count, now);
    for (int j = 0; j < 2; ++j)  // in the place of the results, which come row by row
      sum_columns<false>(terms, s.result[j], s.column + base, basis.c[j] + base, basis.c[j], s.column[base],
                         count);
    for (int64_t row = 0; row < count; row += args.width) {
      double products[kProducts] = {};
      row_products(s.result[0] + row, s.result[1] + row, args.width, products);
      const auto factors = guide_factors(args.guidance, products, args.width, sample, now);
      s.row = -1;
      combine_rows(s, args, route, first, row, row + args.width, now, factors);
    }
    store_strip(s, args, first, count, route.place);
  }
  if (route.place == Place::past_cache) stream_fence();
}

template <typename A>
void combine_long_rows(const CombineArgs<A>& args, const Route& route, int64_t sample, int64_t begin,
                       int64_t end, int64_t now) {
  const GuideBasis<A> basis = guide_basis(args.guidance, sample, now);
  for (int64_t at = begin; at < end; at += args.width) {
    double products[kProducts];
    basis_moments(args, sample, at, at + args.width, basis, products);
    const auto factors = guide_factors(args.guidance, products, args.width, sample, now);
    combine_span(args, route, sample, at, at + args.width, now, factors);
  }
}

template <typename A> Route route_of(const CombineArgs<A>& args) {
  const int64_t bytes = args.samples * args.size * size_of(args.state);
  bool past = true, direct = args.outputs == 1 && sizeof(A) == size_t(size_of(args.state));
  for (int j = 0; j < args.outputs; ++j) {
    past &= should_stream(args.out[j], bytes) && args.out[j] != args.mask.data;
    for (int k = 0; k < args.inputs; ++k) past &= args.out[j] != args.in[k].data;
  }
  bool mixed = direct && sizeof(A) == 4 && args.inputs > 1 && !args.mask.data && args.noise < 0;
  for (int k = 1; k < args.inputs; ++k)
    mixed &= args.in[k].dtype != DType::f32 && args.in[k].dtype == args.in[1].dtype;
  direct &= !past && !args.residuals && !per_token(args.guidance.guide);
  mixed &= !per_token(args.guidance.guide);
  return {past ? Place::past_cache : Place::through_cache, direct, mixed ? args.in[1].dtype : DType::f32};
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

}  // namespace

template <typename A> void combine_cpu(const CombineArgs<A>& args) {
  const Route route = route_of(args);
  const int64_t now = step_of(args);
  const bool tokens = per_token(args.guidance.guide), summed = per_sample(args.guidance.guide);
  if (summed) sum_products(args, now);
  const int64_t block = tokens ? std::max<int64_t>(1, kBlock / args.width) * args.width : kBlock;
  const int64_t blocks = (args.size + block - 1) / block;
#pragma omp parallel for schedule(static) if (args.samples * args.size > 8 * kBlock)
  for (int64_t task = 0; task < args.samples * blocks; ++task) {
    const int64_t sample = task / blocks, begin = task % blocks * block;
    const int64_t end = std::min(begin + block, args.size);
    if (tokens && args.width <= kStrip) {
      combine_short_rows(args, route, sample, begin, end, now);
    } else if (tokens) {
      combine_long_rows(args, route, sample, begin, end, now);
    } else {
      double products[kProducts] = {};
      if (summed) std::copy_n(args.partials + sample * args.chunks * kProducts, kProducts, products);
      combine_span(args, route, sample, begin, end, now,
                   guide_factors(args.guidance, products, args.size, sample, now));
    }
  }
}

template <typename A> void stochastic_step_cpu(const CombineArgs<A>& args) {
  constexpr int kSums = moments_of(1);
  const Route route = route_of(args);
  const int64_t now = step_of(args);
  each_chunk(args, [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end) {
    stochastic_span(args, route, sample, begin, end, now,
                    args.partials + (sample * args.chunks + chunk) * kSums);
  });
  for (int64_t sample = 0; sample < args.samples; ++sample)
    add_chunks(args.partials + sample * args.chunks * kSums, args.chunks, kSums, args.sums + sample * kSums);
}

template void combine_cpu<float>(const CombineArgs<float>&);
template void combine_cpu<double>(const CombineArgs<double>&);
template void stochastic_step_cpu<float>(const CombineArgs<float>&);
template void stochastic_step_cpu<double>(const CombineArgs<double>&);

}  // namespace rfk
