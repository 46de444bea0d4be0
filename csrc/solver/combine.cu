#include "solver/combine.cuh"

namespace rfk {
namespace {

// One element: every result of the columns y and the noise z.
template <bool kMasked, typename A>
__device__ void combine_element(const CombineArgs<A>& args, const Weights<A>& w, const Weights<A>& inside,
                                A m, const A (&y)[kMaxInputs], A z, A (&o)[kMaxOutputs]) {
  const auto weight = [&](A c, A d) { return kMasked ? c + m * (d - c) : c; };
#pragma unroll
  for (int j = 0; j < kMaxOutputs; ++j) {
    if (j >= args.outputs) continue;
    o[j] = weight(w.c[j][0], inside.c[j][0]) * y[0];
#pragma unroll
    for (int k = 1; k < kMaxInputs; ++k)
      if (k < args.inputs) o[j] += weight(w.c[j][k], inside.c[j][k]) * y[k];
    if (args.noise >= 0) o[j] += weight(w.z[j], inside.z[j]) * z;
  }
}

// N neighbours from element `at` of a sample on, N a divisor of a Philox block that begins at a multiple of
// it.
template <int N, bool kMasked, typename A>
__device__ void combine_pack(const CombineArgs<A>& args, const Weights<A>& w, const Weights<A>& inside,
                             int64_t sample, int64_t at, int64_t now) {
  const int64_t element = sample * args.size + at;
  A columns[kMaxInputs][N], mask[N] = {}, result[kMaxOutputs][N];
#pragma unroll
  for (int k = 0; k < kMaxInputs; ++k)
    if (k < args.inputs) load_any<N>(columns[k], args.in[k], element);
  if constexpr (kMasked) load_any<N>(mask, args.mask, element);
  A z[N] = {};
  if (args.noise >= 0) {
    const DrawnPack<N> drawn(key_of(args, sample, now), at);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] = A(drawn.v[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    A y[kMaxInputs], o[kMaxOutputs];
#pragma unroll
    for (int k = 0; k < kMaxInputs; ++k) y[k] = k < args.inputs ? columns[k][i] : A(0);
    combine_element<kMasked>(args, w, inside, mask[i], y, z[i], o);
#pragma unroll
    for (int j = 0; j < kMaxOutputs; ++j) result[j][i] = j < args.outputs ? o[j] : A(0);
  }
#pragma unroll
  for (int j = 0; j < kMaxOutputs; ++j)
    if (j < args.outputs) store_any<N>(args.out[j], args.state, element, result[j]);
}

// The factors of a sample's guide, in every thread of the block.
template <typename A>
__device__ GuideFactors<A> sample_factors(const CombineArgs<A>& args, int64_t sample, int64_t now) {
  double products[kProducts] = {};
  if (per_sample(args.guidance.guide)) {
    __shared__ double sums[kProducts];
    for (int m = threadIdx.x / 32; m < kProducts; m += kCombineWarps) {
      const double sum = sum_of_chunks(args, sample, kProducts, m);
      if (threadIdx.x % 32 == 0) sums[m] = sum;
    }
    __syncthreads();
    for (int m = 0; m < kProducts; ++m) products[m] = sums[m];
  }
  return guide_factors(args.guidance, products, args.size, sample, now);
}

// A thread makes N neighbours at a time, a grid apart; y runs over samples.
template <int N, bool kMasked, typename A>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(CombineArgs<A> args) {
  const int64_t sample = blockIdx.y, now = step_of(args);
  const GuideFactors<A> factors = sample_factors(args, sample, now);
  Weights<A> w, inside;
  int64_t row = -1;
  const int64_t stride = int64_t(gridDim.x) * kCombineThreads * N;
  for (int64_t at = (int64_t(blockIdx.x) * kCombineThreads + threadIdx.x) * N; at < args.size; at += stride) {
    const int64_t of = (sample * args.size + at) / args.plan.cols;
    if (of != row) {
      const RowIndex index = args.plan.index(row = of);
      read_weights(w, args, args.coefs, index, now, factors);
      if constexpr (kMasked) read_weights(inside, args, args.inside, index, now, factors);
    }
    combine_pack<N, kMasked>(args, w, inside, sample, at, now);
  }
}

// One warp for a row along the last axis, whose products give the factors.
template <bool kMasked, typename A>
__global__ void __launch_bounds__(kCombineThreads) combine_tokens_kernel(CombineArgs<A> args) {
  const int64_t now = step_of(args), tokens = args.size / args.width;
  const int64_t token = int64_t(blockIdx.x) * kCombineWarps + threadIdx.x / 32, sample = blockIdx.y;
  if (token >= tokens) return;
  const int lane = threadIdx.x % 32;
  const GuideBasis<A> basis = guide_basis(args.guidance, sample, now);
  const int first = guide_first(args.guidance.guide), last = guide_last(args.guidance.guide);
  Sums<A> sums;
  for (int64_t i = lane; i < args.width; i += 32) {
    A o[kMaxOutputs] = {};
#pragma unroll
    for (int k = 0; k < kGuided; ++k) {
      if (k < first || k >= last) continue;
      A y[1];
      load_any<1>(y, args.in[k], sample * args.size + token * args.width + i);
#pragma unroll
      for (int j = 0; j < 2; ++j) o[j] = k == first ? basis.c[j][k] * y[0] : o[j] + basis.c[j][k] * y[0];
    }
    sums.add(o);
  }
  const double products[kProducts] = {0, 0, warp_sum(double(sums.product[0][0])),
                                      warp_sum(double(sums.product[0][1])),
                                      warp_sum(double(sums.product[1][1]))};
  const auto factors = guide_factors(args.guidance, products, args.width, sample, now);

  Weights<A> w, inside;
  int64_t row = -1;
  for (int64_t i = lane; i < args.width; i += 32) {
    const int64_t at = token * args.width + i, of = (sample * args.size + at) / args.plan.cols;
    if (of != row) {
      const RowIndex index = args.plan.index(row = of);
      read_weights(w, args, args.coefs, index, now, factors);
      if constexpr (kMasked) read_weights(inside, args, args.inside, index, now, factors);
    }
    combine_pack<1, kMasked>(args, w, inside, sample, at, now);
  }
}

template <int N, typename A>
__global__ void __launch_bounds__(kCombineThreads) guide_products_kernel(CombineArgs<A> args) {
  const BasisCoefs<A> basis{guide_basis(args.guidance, int64_t(blockIdx.y), step_of(args))};
  sum_chunk<N>(args, basis, blockIdx.y, blockIdx.x);
}

template <int N, bool kMasked, typename A>
void launch_combine(cudaStream_t stream, const CombineArgs<A>& args) {
  constexpr int64_t kMostBlocks = 4096;
  const dim3 block(kCombineThreads);
  const unsigned samples = unsigned(args.samples);
  if (per_token(args.guidance.guide)) {
    const int64_t tokens = args.size / args.width, blocks = (tokens + kCombineWarps - 1) / kCombineWarps;
    return launch("combine", &combine_tokens_kernel<kMasked, A>, dim3(unsigned(blocks), samples), block, 0,
                  stream, args);
  }
  if (per_sample(args.guidance.guide))
    launch("combine", &guide_products_kernel<N, A>, dim3(unsigned(args.chunks), samples), block, 0, stream,
           args);
  const int64_t blocks = (args.size + kCombineThreads * N - 1) / (kCombineThreads * N);
  launch("combine", &combine_kernel<N, kMasked, A>, dim3(unsigned(std::min(blocks, kMostBlocks)), samples),
         block, 0, stream, args);
}

}  // namespace

template <typename A> void combine_cuda(Stream stream, int device, const CombineArgs<A>& args) {
  const DeviceGuard guard(device);
  check(args.samples <= 65535, "combine: expected at most 65535 samples on CUDA, got ", args.samples);
  const auto run = [&]<int N>() {
    if (args.mask.data)
      launch_combine<N, true>(cudaStream_t(stream), args);
    else
      launch_combine<N, false>(cudaStream_t(stream), args);
  };
  takes_vectors(args, args.outputs) ? run.template operator()<kCombinePack<A>>()
                                    : run.template operator()<1>();
}

template void combine_cuda<float>(Stream, int, const CombineArgs<float>&);
template void combine_cuda<double>(Stream, int, const CombineArgs<double>&);

}  // namespace rfk
