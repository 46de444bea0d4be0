#include "solver/combine_strip.h"

namespace rfk {
namespace {

template <typename A>
RFK_SIMD void table_moments(const CombineArgs<A>& args, int64_t sample, int64_t begin, int64_t end,
                            double* sums) {
  const TableCoefs<A> coefs;
  if (args.outputs == 1)
    moments_span<1>(args, coefs, sample, begin, end, sums);
  else if (args.outputs == 2)
    moments_span<2>(args, coefs, sample, begin, end, sums);
  else
    moments_span<3>(args, coefs, sample, begin, end, sums);
}

}  // namespace

template <typename A> void moments_cpu(const CombineArgs<A>& args) {
  const int moments = moments_of(args.outputs);
  each_chunk(args, [&](int64_t sample, int64_t chunk, int64_t begin, int64_t end) {
    table_moments(args, sample, begin, end, args.partials + (sample * args.chunks + chunk) * moments);
  });
  for (int64_t sample = 0; sample < args.samples; ++sample)
    add_chunks(args.partials + sample * args.chunks * moments, args.chunks, moments,
               args.sums + sample * moments);
}

template void moments_cpu<float>(const CombineArgs<float>&);
template void moments_cpu<double>(const CombineArgs<double>&);

}  // namespace rfk
