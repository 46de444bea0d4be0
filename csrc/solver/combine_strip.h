#pragma once

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/map_vectors_cpu.h"
#include "core/stream_store.h"
#include "noise/noise_rows_cpu.h"
#include "solver/combine.h"

// What the CPU halves of combine, moments and stochastic_step share. Strip by strip: every tensor is read
// once and widened, combinations are made column by column in the innermost cache.

namespace rfk {

inline constexpr int64_t kStrip = 256, kBlock = 4096;  // elements of a strip, and of a task
inline constexpr int kMaxTerms = kMaxInputs + 1;       // tensors and noise

template <typename A> struct Strip {
  alignas(64) A wide[kMaxTerms][kStrip], mask[kStrip], result[kMaxOutputs][kStrip];
  const A* column[kMaxTerms];
  Weights<A> weights, inside;  // of that row
  int64_t row = -1;
};

template <typename A> RFK_HD const A* widen_any(A* buffer, AnyFloats from, int64_t at, int64_t count) {
  if (from.dtype == DType::bf16) return widen(buffer, static_cast<const bf16*>(from.data) + at, count);
  if (from.dtype == DType::f16) return widen(buffer, static_cast<const f16*>(from.data) + at, count);
  return static_cast<const A*>(from.data) + at;
}

// Columns `first` .. `last` of `count` elements.
template <typename A>
RFK_HD void load_strip(Strip<A>& s, const CombineArgs<A>& args, int first, int last, int64_t at,
                       int64_t count) {
  for (int k = first; k < last; ++k) s.column[k] = widen_any(s.wide[k], args.in[k], at, count);
}

// to[i] = sum_k c_k y_k[i], from left to right; with a mask m c_k is c_k + m[i] (d_k - c_k).
template <int K, bool kMasked, typename A>
RFK_HD void sum_columns(A* to, const A* const* y, const A* c, const A* d, const A* m, int64_t count) {
  const A* in[K];
  A weight[K], change[K];
  for (int k = 0; k < K; ++k) in[k] = y[k], weight[k] = c[k], change[k] = kMasked ? d[k] - c[k] : A(0);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A sum = (kMasked ? weight[0] + m[i] * change[0] : weight[0]) * in[0][i];
    for (int k = 1; k < K; ++k) sum += (kMasked ? weight[k] + m[i] * change[k] : weight[k]) * in[k][i];
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

// Sums of J combinations and of their products, in the order of an upper triangle: in lanes whose order is
// that of every instruction set, of type A for a thousand elements, then in double.
template <typename A, int J> class Moments {
 public:
  RFK_HD void add(const A (&o)[kMaxOutputs][kStrip], int64_t count) {
    int64_t at = 0;
    for (; at + kLanes <= count; at += kLanes) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) add_one(o, at, l);
    }
    for (int l = 0; at + l < count; ++l) add_one(o, at, l);
    pending_ += count;
    if (pending_ >= kPart) flush();
  }

  RFK_HD void finish(double* sums) {
    flush();
    for (int m = 0; m < kCount; ++m) {
      sums[m] = 0;
      for (double lane : whole_[m]) sums[m] += lane;
    }
  }

 private:
  static constexpr int kLanes = 32, kPart = 1024, kCount = moments_of(J);

  RFK_HD void add_one(const A (&o)[kMaxOutputs][kStrip], int64_t at, int l) {
    A v[J];
    for (int j = 0; j < J; ++j) part_[j][l] += v[j] = o[j][at + l];
    int m = J;
    for (int i = 0; i < J; ++i)
      for (int j = i; j < J; ++j) part_[m++][l] += v[i] * v[j];
  }

  RFK_HD void flush() {
    for (int m = 0; m < kCount; ++m) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        whole_[m][l] += double(part_[m][l]);
        part_[m][l] = 0;
      }
    }
    pending_ = 0;
  }

  alignas(64) A part_[kCount][kLanes] = {};
  alignas(64) double whole_[kCount][kLanes] = {};
  int64_t pending_ = 0;
};

// The moments of J combinations over elements begin .. end of a sample; `coefs`: of tensors first() ..
// last().
template <int J, typename A, typename Coefs>
RFK_HD void moments_span(const CombineArgs<A>& args, const Coefs& coefs, int64_t sample, int64_t begin,
                         int64_t end, double* sums) {
  Strip<A> s;
  Moments<A, J> moments;
  const int base = coefs.first(args), terms = coefs.last(args) - base;
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
      for (int j = 0; j < J; ++j)
        sum_columns<false>(terms, s.result[j] + from, y, c[j] + base, c[j], y[0], to - from);
      from = to;
    }
    moments.add(s.result, count);
  }
  moments.finish(sums);
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
inline void add_chunks(const double* partials, int64_t chunks, int moments, double* sums) {
  double total[kMaxMoments] = {};
  for (int64_t c = 0; c < chunks; ++c)
    for (int m = 0; m < moments; ++m) total[m] += partials[c * moments + m];
  std::copy(total, total + moments, sums);
}

}  // namespace rfk
