#include <limits>

#include "core/activation.h"
#include "moe/grouped.cuh"

// The product by multiply-and-add, for float and double.

namespace rfk {
namespace {

constexpr int kTile = 64, kInputs = 16, kThreads = 256, kPadded = kTile + 4;

template <typename A> struct Slab {
  A x[kInputs][kPadded], weight[2][kInputs][kPadded];
};

// Thread (i, j) of 16 x 16 has rows 4 i .. and columns 4 j .. of both panels.
template <typename A> __device__ __forceinline__ void multiply_slab(A (&sums)[2][4][4], const Slab<A>& slab) {
  const int i = 4 * (int(threadIdx.x) / 16), j = 4 * (int(threadIdx.x) % 16);
#pragma unroll 4
  for (int k = 0; k < kInputs; ++k) {
    A a[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) a[e] = slab.x[k][i + e];
#pragma unroll
    for (int w = 0; w < 2; ++w)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const A b = slab.weight[w][k][j + c];
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[w][r][c] = std::fma(a[r], b, sums[w][r][c]);
      }
  }
}

template <typename A>
__device__ __forceinline__ void store_tile(const GroupedArgs& args, const GroupedRows& rows,
                                           const A (&sums)[2][4][4]) {
  const int i = 4 * (int(threadIdx.x) / 16), j = 4 * (int(threadIdx.x) % 16);
  A* const out = static_cast<A*>(args.out);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    A bias[2] = {};
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const int column = grouped_column(args, w, kTile) + j + c;
      const auto* const given =
          rows.expert < args.experts ? static_cast<const A*>(args.bias[w][rows.expert]) : nullptr;
      if (given && column < args.n) bias[w] = given[column];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int slot = rows.first + i + r;
      if (slot >= rows.end) continue;
      A v[2] = {sums[0][r][c] + bias[0], sums[1][r][c] + bias[1]};
      if (rows.row_of(args, slot) < 0 && rows.expert < args.experts)
        v[0] = v[1] = std::numeric_limits<A>::quiet_NaN();
      if (args.gated) v[0] = activate(Activation::silu, v[0]) * v[1];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const int column = grouped_column(args, w, kTile) + j + c;
        if (column < args.n && !(w && args.gated)) out[slot * args.out_stride + column] = v[w];
      }
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) grouped_fma_kernel(const __grid_constant__ GroupedArgs args) {
  alignas(16) __shared__ unsigned char memory[sizeof(Slab<A>)];
  Slab<A>& slab = *reinterpret_cast<Slab<A>*>(memory);
  const GroupedRows rows(args, int(blockIdx.x), kTile);
  if (rows.none()) return;
  A sums[2][4][4] = {};
  if (rows.expert < args.experts) {
    const int mine = int(threadIdx.x) / 4, first = 4 * (int(threadIdx.x) % 4), slot = rows.first + mine;
    const int row = slot < rows.end ? rows.row_of(args, slot) : -1;
    const A* const x = static_cast<const A*>(args.x) + row * args.x_stride;
#pragma unroll 1
    for (int k = 0; k < args.k; k += kInputs) {
      __syncthreads();  // the slab before has been read
#pragma unroll 1
      for (int e = first; e < first + 4; ++e) {
        const bool valid = k + e < args.k;
        slab.x[e][mine] = valid && row >= 0 ? x[k + e] : A(0);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int column = grouped_column(args, w, kTile) + mine;
          const auto* const weight = static_cast<const A*>(args.weights[w][rows.expert]);
          slab.weight[w][e][mine] =
              valid && column < args.n ? weight[int64_t(column) * args.k + k + e] : A(0);
        }
      }
      __syncthreads();
      multiply_slab(sums, slab);
    }
  }
  store_tile(args, rows, sums);
}

}  // namespace

void grouped_fma(Stream stream, DType dtype, const GroupedArgs& args) {
  const auto run = [&]<typename A>() {
    launch("grouped_linear", grouped_fma_kernel<A>, grouped_grid(args, kTile, kTile), dim3(kThreads), 0,
           cudaStream_t(stream), args);
  };
  dtype == DType::f64 ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace rfk
