#include "solver/combine.cuh"

namespace rfk {
namespace {

template <int N, typename A>
__global__ void __launch_bounds__(kCombineThreads) moments_kernel(CombineArgs<A> args) {
  sum_chunk<N>(args, TableCoefs<A>{}, blockIdx.y, blockIdx.x);
}

}  // namespace

template <typename A> void moments_cuda(Stream stream, int device, const CombineArgs<A>& args) {
  const DeviceGuard guard(device);
  check(args.samples <= 65535, "moments: expected at most 65535 samples, got ", args.samples);
  const dim3 grid(unsigned(args.chunks), unsigned(args.samples));
  const int moments = moments_of(args.outputs);
  const auto kernel = takes_vectors(args, 0) ? &moments_kernel<kCombinePack<A>, A> : &moments_kernel<1, A>;
  launch("moments", kernel, grid, dim3(kCombineThreads), 0, cudaStream_t(stream), args);
  launch("moments", &add_chunks_kernel<A>, dim3(unsigned(args.samples)), dim3(32 * moments), 0,
         cudaStream_t(stream), args, moments);
}

template void moments_cuda<float>(Stream, int, const CombineArgs<float>&);
template void moments_cuda<double>(Stream, int, const CombineArgs<double>&);

}  // namespace rfk
