#include "solver/combine.cuh"

namespace rfk {
namespace {

// A chunk of a sample by one block, in the order of sum_chunk: its sums have the bits of moments.
template <int N, typename A>
__global__ void __launch_bounds__(kCombineThreads) stochastic_step_kernel(CombineArgs<A> args) {
  const int64_t sample = blockIdx.y, chunk = blockIdx.x, now = step_of(args), begin = chunk * args.chunk;
  const int64_t end = begin + args.chunk < args.size ? begin + args.chunk : args.size;
  Sums<A> sums;
  Weights<A> w;
  int64_t row = -1;
  for (int64_t at = begin + int64_t(threadIdx.x) * N; at < end; at += kCombineThreads * N) {
    const int64_t element = sample * args.size + at, of = element / args.plan.cols;
    A y[kMaxInputs][N], result[N];
#pragma unroll
    for (int k = 0; k < kMaxInputs; ++k)
      if (k < args.inputs) load_any<N>(y[k], args.in[k], element);
    if (of != row) read_weights(w, args, args.coefs, args.plan.index(row = of), now, GuideFactors<A>{});
    const DrawnPack<N> z(key_of(args, sample, now), at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A mean = w.c[0][0] * y[0][i];
#pragma unroll
      for (int k = 1; k < kMaxInputs; ++k)
        if (k < args.inputs) mean += w.c[0][k] * y[k][i];
      result[i] = mean + w.z[0] * A(z.v[i]);
      const A residual = -mean + stored_as(result[i], args.state);
      sums.sum[0] += residual;
      sums.product[0][0] += residual * residual;
    }
    store_any<N>(args.out[0], args.state, element, result);
  }
  write_sums(args, sums, 1, sample, chunk);
}

}  // namespace

template <typename A> void stochastic_step_cuda(Stream stream, int device, const CombineArgs<A>& args) {
  const DeviceGuard guard(device);
  check(args.samples <= 65535, "stochastic_step: expected at most 65535 samples on CUDA, got ", args.samples);
  const dim3 grid(unsigned(args.chunks), unsigned(args.samples)), block(kCombineThreads);
  const auto kernel =
      takes_vectors(args, 1) ? &stochastic_step_kernel<kCombinePack<A>, A> : &stochastic_step_kernel<1, A>;
  launch("stochastic_step", kernel, grid, block, 0, cudaStream_t(stream), args);
  launch("stochastic_step", &add_chunks_kernel<A>, dim3(unsigned(args.samples)), dim3(32 * moments_of(1)), 0,
         cudaStream_t(stream), args, moments_of(1));
}

template void stochastic_step_cuda<float>(Stream, int, const CombineArgs<float>&);
template void stochastic_step_cuda<double>(Stream, int, const CombineArgs<double>&);

}  // namespace rfk
