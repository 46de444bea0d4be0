#include <limits>

#include "core/activation.h"
#include "core/map_rows.cuh"
#include "core/slab.cuh"
#include "moe/grouped.cuh"

// The product on tensor cores, for f16 and bf16: slabs of 64 bytes of a row (core/slab.cuh) of x and of both
// panels of weights pass through a pipeline in shared memory.

namespace rfk {
namespace {

constexpr int kThreads = 128, kColumns = 64;  // of a panel; four warps, two by two

// A warp has MT pieces of 16 rows and 32 columns of both panels.
template <int MT> struct Tile {
  static constexpr int kMT = MT, kRows = 32 * MT, kStages = MT == 4 ? 3 : 4;
  static constexpr int kX = 64 * kRows, kStage = kX + 2 * 64 * kColumns;
  static_assert(kStages * kStage <= 48 << 10);
};

template <int MT> using Sums = float[2][MT][4][4];

// One thread's share of copying: a piece of 16 bytes of every 32nd row of x and of the panels, slab by slab.
template <typename Tile> struct Loader {
  static constexpr int kRows = Tile::kMT, kWeights = 4;
  const uint8_t *x[kRows], *weights[kWeights];  // null where there is no row
  int piece, row, left;                         // left: bytes of a row from the piece on
  bool x_pieces, weight_pieces;

  __device__ Loader(const GroupedArgs& args, const GroupedRows& rows)
      : piece(int(threadIdx.x) % 4), row(int(threadIdx.x) / 4), left(2 * args.k - 16 * piece) {
    x_pieces = args.x_pieces, weight_pieces = args.weight_pieces;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int slot = rows.first + row + 32 * i, from = slot < rows.end ? rows.row_of(args, slot) : -1;
      const auto* const data = static_cast<const uint8_t*>(args.x);
      x[i] = from < 0 ? nullptr : data + 2 * from * args.x_stride + 16 * piece;
    }
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int column = grouped_column(args, i / 2, kColumns) + row + 32 * (i % 2);
      const auto* const data = static_cast<const uint8_t*>(args.weights[i / 2][rows.expert]);
      weights[i] = column < args.n ? data + 2 * int64_t(column) * args.k + 16 * piece : nullptr;
    }
  }

  __device__ __forceinline__ static void copy(uint8_t* to, const uint8_t* from, int offset, int left,
                                              bool pieces, const void* any) {
    const bool valid = from && left > 0;
    const uint8_t* const source = valid ? from + offset : static_cast<const uint8_t*>(any);
    if (pieces)
      cp_async_zfill<16>(to, source, valid);
    else
      copy_elements<2>(to, source, valid ? left : 0);
  }

  __device__ __forceinline__ void load(const GroupedArgs& args, uint8_t* stage, int slab) const {
    const int offset = 64 * slab, rest = left - offset;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      copy(stage + 64 * (row + 32 * i) + 16 * piece, x[i], offset, rest, x_pieces, args.x);
    uint8_t* const panels = stage + Tile::kX;
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int slot = 64 * (i / 2) + weight_slot(row + 32 * (i % 2));
      copy(panels + 64 * slot + 16 * piece, weights[i], offset, rest, weight_pieces, args.x);
    }
  }
};

template <typename T, int MT>
__device__ __forceinline__ void multiply_slab(Sums<MT>& sums, const uint8_t* stage, int row, int column,
                                              int lane) {
  XFragment a[MT];
#pragma unroll
  for (int i = 0; i < MT; ++i) a[i] = load_x_slab(stage, row + 16 * i, lane);
#pragma unroll
  for (int w = 0; w < 2; ++w)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint8_t* const panel = stage + Tile<MT>::kX + 64 * kColumns * w;
      const WeightFragment b = load_weight_slab(panel, column + 8 * j, lane);
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float (&sum)[4] = sums[w][i][j];
          if constexpr (std::is_same_v<T, bf16>)
            mma_bf16(sum, a[i].step[h], b.step[h], sum);
          else
            mma_f16(sum, a[i].step[h], b.step[h], sum);
        }
    }
}

template <typename T, int MT>
__device__ __forceinline__ void multiply(Sums<MT>& sums, const GroupedArgs& args, const GroupedRows& rows,
                                         uint8_t* shared, int row, int column, int lane) {
  using S = Tile<MT>;
  const Loader<S> loader(args, rows);
  const int slabs = (args.k + 31) / 32;
#pragma unroll 1
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < slabs) loader.load(args, shared + s * S::kStage, s);
    cp_async_commit();
  }
  int reading = 0, writing = (S::kStages - 1) * S::kStage;
#pragma unroll 1
  for (int s = 0; s < slabs; ++s) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this slab is there, and the one before it has been read by all
    if (s + S::kStages - 1 < slabs) loader.load(args, shared + writing, s + S::kStages - 1);
    cp_async_commit();
    multiply_slab<T, MT>(sums, shared + reading, row, column, lane);
    reading = reading + S::kStage < S::kStages * S::kStage ? reading + S::kStage : 0;
    writing = writing + S::kStage < S::kStages * S::kStage ? writing + S::kStage : 0;
  }
  cp_async_wait<0>();
}

// Eight neighbours of a row from `column` on.
template <typename T>
__device__ __forceinline__ void store_eight(const GroupedArgs& args, int slot, int column,
                                            const float (&v)[8]) {
  T* const to = static_cast<T*>(args.out) + slot * args.out_stride + column;
  Pack<T, 8> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.v[i] = store<T>(v[i]);
  if (args.out_pieces && column < args.n) {
    *reinterpret_cast<Pack<T, 8>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < args.n) to[i] = pack.v[i];
}

// Lane 4 g + t has rows g and g + 8 of every piece, and eight neighbours 8 t .. of 32 columns.
template <typename T, int MT>
__device__ __forceinline__ void store_tile(const GroupedArgs& args, const GroupedRows& rows,
                                           const Sums<MT>& sums, int row, int column, int lane) {
  const bool real = rows.expert < args.experts;
  float bias[2][8] = {};
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const auto* const given = real ? static_cast<const T*>(args.bias[w][rows.expert]) : nullptr;
    const int first = grouped_column(args, w, kColumns) + column + 8 * (lane % 4);
    if (!given) continue;
#pragma unroll
    for (int c = 0; c < 8; ++c) bias[w][c] = first + c < args.n ? load(given[first + c]) : 0.0f;
  }
#pragma unroll
  for (int u = 0; u < 2 * MT; ++u) {
    const int slot = rows.first + row + 8 * u + lane / 4;
    if (slot >= rows.end) continue;
    const bool poison = real && rows.row_of(args, slot) < 0;
    float v[2][8];
#pragma unroll
    for (int w = 0; w < 2; ++w)
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        v[w][c] = sums[w][u / 2][c / 2][2 * (u % 2) + c % 2] + bias[w][c];
        if (poison) v[w][c] = std::numeric_limits<float>::quiet_NaN();
      }
    if (args.gated) {
#pragma unroll
      for (int c = 0; c < 8; ++c) v[0][c] = activate(Activation::silu, v[0][c]) * v[1][c];
    }
#pragma unroll
    for (int w = 0; w < 2; ++w)
      if (w == 0 || !args.gated)
        store_eight<T>(args, slot, grouped_column(args, w, kColumns) + column + 8 * (lane % 4), v[w]);
  }
}

template <typename T, int MT>
__global__ void __launch_bounds__(kThreads, 2) grouped_mma_kernel(const __grid_constant__ GroupedArgs args) {
  uint8_t* const shared = dynamic_shared<uint8_t>();
  const GroupedRows rows(args, int(blockIdx.x), Tile<MT>::kRows);
  if (rows.none()) return;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int row = warp / 2 * 16 * MT, column = warp % 2 * 32;
  Sums<MT> sums = {};
  if (rows.expert < args.experts) multiply<T, MT>(sums, args, rows, shared, row, column, lane);
  store_tile<T, MT>(args, rows, sums, row, column, lane);
}

template <typename T, int MT> void run(cudaStream_t stream, const GroupedArgs& args) {
  launch("grouped_linear", grouped_mma_kernel<T, MT>, grouped_grid(args, Tile<MT>::kRows, kColumns),
         dim3(kThreads), Tile<MT>::kStages * Tile<MT>::kStage, stream, args);
}

}  // namespace

void grouped_mma(Stream stream, DType dtype, const GroupedArgs& args) {
  const auto s = cudaStream_t(stream);
  const bool large = args.slots >= 256 * args.experts;  // then few tiles of 128 rows are not full
  if (dtype == DType::bf16) return large ? run<bf16, 4>(s, args) : run<bf16, 2>(s, args);
  large ? run<f16, 4>(s, args) : run<f16, 2>(s, args);
}

}  // namespace rfk
