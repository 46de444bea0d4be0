#include "linear/elements.cuh"
#include "linear/kernels.h"

// The product by multiply-and-add, for float and double, and for the shapes that tensor cores do not take.

namespace rfk {
namespace {

constexpr int kTile = 64, kInputs = 16, kThreads = 256, kPadded = kTile + 4;

template <typename A> struct Slab {
  A x[kInputs][kPadded], weight[kInputs][kPadded];
};

// Thread (i, j) of 16 x 16 has rows 4 i .. and columns 4 j .. of the tile.
template <typename A> __device__ __forceinline__ void multiply_slab(A (&sums)[4][4], const Slab<A>& slab) {
  const int i = 4 * (int(threadIdx.x) / 16), j = 4 * (int(threadIdx.x) % 16);
#pragma unroll
  for (int k = 0; k < kInputs; ++k) {
    A a[4], b[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = slab.x[k][i + e], b[e] = slab.weight[k][j + e];
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[r][c] = std::fma(a[r], b[c], sums[r][c]);
  }
}

// sums += a b^T over `inputs`; x_element and weight_element take a row of the tile and an input
template <typename A, typename X, typename W>
__device__ __forceinline__ void multiply(A (&sums)[4][4], Slab<A>& slab, int inputs, X x_element,
                                         W weight_element) {
  const int row = int(threadIdx.x) / 4, first = 4 * (int(threadIdx.x) % 4);
#pragma unroll 1
  for (int k = 0; k < inputs; k += kInputs) {
    __syncthreads();  // the slab before has been read
#pragma unroll 1
    for (int e = first; e < first + 4; ++e) {
      const bool valid = k + e < inputs;
      slab.x[e][row] = valid ? x_element(row, k + e) : A(0);
      slab.weight[e][row] = valid ? weight_element(row, k + e) : A(0);
    }
    __syncthreads();
    multiply_slab(sums, slab);
  }
}

template <typename A> __global__ void __launch_bounds__(kThreads) linear_fma_kernel(LinearArgs args) {
  alignas(16) __shared__ unsigned char memory[sizeof(Slab<A>)];
  Slab<A>& slab = *reinterpret_cast<Slab<A>*>(memory);
  const int first_row = int(blockIdx.x) * kTile, first_column = int(blockIdx.y) * kTile;
  const auto rows = [&](int r) { return first_row + r < args.m; };
  const auto columns = [&](int c) { return first_column + c < args.n; };

  A sums[4][4] = {};
  multiply(
      sums, slab, args.k, [&](int r, int k) { return rows(r) ? x_at<A>(args, first_row + r, k) : A(0); },
      [&](int c, int k) { return columns(c) ? weight_at<A>(args, first_column + c, k) : A(0); });

  const int row = first_row + 4 * (int(threadIdx.x) / 16),
            column = first_column + 4 * (int(threadIdx.x) % 16);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const A scale = column_scale<A>(args, column + c);
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[r][c] *= scale;
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const A scale = row_scale_of<A>(args, row + r);
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[r][c] *= scale;
  }
  if (args.rank > 0)
    multiply(
        sums, slab, args.rank,
        [&](int r, int k) {
          return rows(r) ? number_at<A>(args.hidden, (first_row + r) * args.hidden.stride + k) : A(0);
        },
        [&](int c, int k) {
          return columns(c) ? number_at<A>(args.up, (first_column + c) * args.up.stride + k) : A(0);
        });
#pragma unroll 1
  for (int r = 0; r < 4; ++r) {
    A v[4];
    pick(v, sums, r);
    finish(v, args, row + r, column);
  }
}

}  // namespace

void linear_fma(Stream stream, const LinearArgs& args) {
  const auto run = [&]<typename A>() {
    launch("linear_fma", linear_fma_kernel<A>,
           dim3(unsigned((int64_t(args.m) + kTile - 1) / kTile), unsigned((args.n + kTile - 1) / kTile)),
           dim3(kThreads), 0, cudaStream_t(stream), args);
  };
  args.x.dtype == DType::f64 ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace rfk
