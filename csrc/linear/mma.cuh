#pragma once

#include "linear/stage.cuh"
#include "linear/tile_choice.h"

// The product on tensor cores: a block computes a tile of the result, in slabs of 64 bytes of a row of x that
// pass through a pipeline of stages in shared memory.

namespace rfk {

template <typename Acc, typename Tile> using Sums = Acc[Tile::kMT][Tile::kNT][4];

// Where a warp and a lane are in the tile.
template <typename Tile> struct Place {
  int row, column, lane;  // of the warp
  __device__ Place() {
    const int warp = int(threadIdx.x) / 32;
    row = warp / Tile::kWarpsN * Tile::kWarpRows;
    column = warp % Tile::kWarpsN * Tile::kWarpColumns;
    lane = int(threadIdx.x) % 32;
  }
};

template <typename Kind, typename Tile>
__device__ __forceinline__ void load_x(XFragment (&a)[Tile::kMT], const uint8_t* x, const Place<Tile>& at) {
#pragma unroll
  for (int i = 0; i < Tile::kMT; ++i) a[i] = Kind::load_x(x, at.row + 16 * i, at.lane);
}

// sums += x weight^T of one slab
template <typename Kind, typename Tile>
__device__ __forceinline__ void multiply_slab(Sums<typename Kind::Acc, Tile>& sums, const uint8_t* x,
                                              const uint8_t* weight, const uint8_t* rows,
                                              const Place<Tile>& at) {
  XFragment a[Tile::kMT];
  load_x<Kind, Tile>(a, x, at);
#pragma unroll
  for (int j = 0; j < Tile::kNT; ++j) {
    const WeightFragment w = Kind::load_weight(weight, rows, at.column + 8 * j, at.lane);
#pragma unroll
    for (int i = 0; i < Tile::kMT; ++i) {
      if constexpr (std::is_same_v<Kind, E4m3E4m3>) {
        float part[4] = {};
        Kind::mma(part, a[i].step[0], w.step[0], part);
        Kind::mma(part, a[i].step[1], w.step[1], part);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] += part[e];
      } else {
        Kind::mma(sums[i][j], a[i].step[0], w.step[0], sums[i][j]);
        Kind::mma(sums[i][j], a[i].step[1], w.step[1], sums[i][j]);
      }
    }
  }
}

// Of the columns of `at.lane` in piece j, two numbers of a table of all columns of the tile.
template <typename Tile>
__device__ __forceinline__ float2 of_columns(const uint8_t* rows, int table, const Place<Tile>& at, int j) {
  const float* const numbers = reinterpret_cast<const float*>(rows) + table * Tile::kColumns + at.column;
  return *reinterpret_cast<const float2*>(numbers + 8 * (at.lane % 4) + 32 * (j / 4) + 2 * (j % 4));
}

// The same where every slab has a scale of its own, by column.
template <typename Kind, typename Tile>
__device__ __forceinline__ void multiply_scaled(Sums<float, Tile>& sums, const uint8_t* x,
                                                const uint8_t* weight, const uint8_t* rows,
                                                const Place<Tile>& at, bool with_offset) {
  XFragment a[Tile::kMT];
  load_x<Kind, Tile>(a, x, at);
  float totals[Tile::kMT][2] = {};  // of rows of x
  if (with_offset) {
    constexpr uint32_t kOne = kOnes<typename Kind::Element>;
    const uint32_t ones[2] = {kOne, kOne};
#pragma unroll
    for (int i = 0; i < Tile::kMT; ++i) {
      float part[4] = {};
      Kind::mma(part, a[i].step[0], ones, part);
      Kind::mma(part, a[i].step[1], ones, part);
      totals[i][0] = part[0], totals[i][1] = part[2];
    }
  }
#pragma unroll
  for (int j = 0; j < Tile::kNT; ++j) {
    const WeightFragment w = Kind::load_weight(weight, rows, at.column + 8 * j, at.lane);
    const float2 scale = of_columns(rows, 1, at, j), offset = of_columns(rows, 2, at, j);
#pragma unroll
    for (int i = 0; i < Tile::kMT; ++i) {
      float part[4] = {};
      Kind::mma(part, a[i].step[0], w.step[0], part);
      Kind::mma(part, a[i].step[1], w.step[1], part);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][j][e] = std::fma(part[e], e % 2 ? scale.y : scale.x, sums[i][j][e]);
        if (with_offset)
          sums[i][j][e] = std::fma(totals[i][e / 2], e % 2 ? offset.y : offset.x, sums[i][j][e]);
      }
    }
  }
}

// The same where sums of groups are exact integers and added up as float. A sum that starts at the bits
// of 1.5 2^23 is, as a float, 1.5 2^23 + the sum.
template <typename Kind, typename Tile>
__device__ __forceinline__ void multiply_int8_scaled(Sums<float, Tile>& sums, const uint8_t* x,
                                                     const uint8_t* weight, const uint8_t* rows,
                                                     const Place<Tile>& at, bool whole_slab) {
  constexpr int32_t kMagic = 0x4b400000;
  XFragment a[Tile::kMT];
  load_x<Kind, Tile>(a, x, at);
  const auto add = [&](float (&sum)[4], const int32_t (&part)[4], float2 scale) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sum[e] = std::fma(std::bit_cast<float>(part[e]) - std::bit_cast<float>(kMagic),
                        e % 2 ? scale.y : scale.x, sum[e]);
  };
#pragma unroll
  for (int j = 0; j < Tile::kNT; ++j) {
    const WeightFragment w = Kind::load_weight(weight, rows, at.column + 8 * j, at.lane);
    const float2 first = of_columns(rows, 0, at, j), second = of_columns(rows, 1, at, j);
#pragma unroll
    for (int i = 0; i < Tile::kMT; ++i) {
      int32_t part[4] = {kMagic, kMagic, kMagic, kMagic};
      Kind::mma(part, a[i].step[0], w.step[0], part);
      if (!whole_slab) {
        add(sums[i][j], part, first);
#pragma unroll
        for (int e = 0; e < 4; ++e) part[e] = kMagic;
      }
      Kind::mma(part, a[i].step[1], w.step[1], part);
      add(sums[i][j], part, second);
    }
  }
}

// sums = x weight^T over all slabs
template <typename Kind, typename Tile>
__device__ __forceinline__ void multiply(Sums<typename Kind::Acc, Tile>& sums, const LinearArgs& args,
                                         uint8_t* shared, const Place<Tile>& at) {
  using S = Stage<Kind, Tile>;
  constexpr int kAhead = Tile::kStages - 1, kRing = Tile::kStages * S::kBytes;
  const int first_row = int(blockIdx.x) * Tile::kRows, first_column = int(blockIdx.y) * Tile::kColumns;
  constexpr int kWeightElement = Kind::kWeightBytes == 64 ? Kind::kXBytes : 1;
  const int64_t x_bytes = int64_t(args.k) * Kind::kXBytes, weight_bytes = args.weight.stride * kWeightElement;
  PieceLoader<Tile::kRows, 4, Tile::kThreads, Kind::kXBytes> x(args.x.data, args.x.stride * Kind::kXBytes,
                                                               x_bytes, first_row, args.m, args.x_pieces);
  PieceLoader<Tile::kColumns, Kind::kWeightBytes / 16, Tile::kThreads, kWeightElement> weight(
      args.weight.data, weight_bytes, weight_bytes, first_column, args.n, args.weight_pieces);
  std::conditional_t<kIsDecoded<Kind>, BlockLoader<Kind, Tile>, RowLoader<Kind, Tile>> row;
  const auto load = [&](int offset) {
    x.load(shared + offset, [](int r, int piece) { return Kind::x_piece(r, piece); });
    if constexpr (!kIsDecoded<Kind>)
      weight.load(shared + offset + S::kX,
                  [](int r, int piece) { return Kind::weight_piece(weight_slot(r), piece); });
  };

  const int slabs = (args.k + Kind::kInputs - 1) / Kind::kInputs;
#pragma unroll 1
  for (int s = 0; s < kAhead; ++s) {
    if (s < slabs) {
      load(s * S::kBytes);
      row.fetch(args, first_column, s);
      row.store(shared + s * S::kBytes);
    }
    cp_async_commit();
  }
  int reading = 0, writing = kAhead * S::kBytes;
  const bool whole_slab = args.group % Kind::kInputs == 0;
  const bool with_offset = args.weight_zero.data && args.weight_zero.dtype != DType::u8;
#pragma unroll 1
  for (int s = 0; s < slabs; ++s) {
    cp_async_wait<kAhead - 1>();
    __syncthreads();  // this slab is there, and the one before it has been read by all
    const bool more = s + kAhead < slabs;
    if (more) {
      row.fetch(args, first_column, s + kAhead);
      load(writing);
    }
    cp_async_commit();
    const uint8_t *const stage = shared + reading, *const w = stage + S::kX, *const rows = w + S::kWeight;
    if constexpr (Kind::kByGroup && Kind::kXBytes == 1)
      multiply_int8_scaled<Kind, Tile>(sums, stage, w, rows, at, whole_slab);
    else if constexpr (Kind::kByGroup)
      multiply_scaled<Kind, Tile>(sums, stage, w, rows, at, with_offset);
    else
      multiply_slab<Kind, Tile>(sums, stage, w, rows, at);
    if (more) row.store(shared + writing);
    reading = reading + S::kBytes < kRing ? reading + S::kBytes : 0;
    writing = writing + S::kBytes < kRing ? writing + S::kBytes : 0;
  }
  cp_async_wait<0>();
}

// Eight numbers of a table of rows, rounded to T, in the order of memory; zeros beyond the table
template <typename T>
__device__ __forceinline__ void copy_rounded(uint8_t* to, const Table& table, int row, int rows, int column,
                                             int columns, bool pieces) {
  float v[8];
  const int count = row < rows ? std::min(8, columns - column) : 0;
  if (count > 0) {
    load_numbers(v, table, row * table.stride + column, count, pieces);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0;
  }
  uint4 words;
  words.x = pair_of<T>(v[0], v[1]), words.y = pair_of<T>(v[2], v[3]);
  words.z = pair_of<T>(v[4], v[5]), words.w = pair_of<T>(v[6], v[7]);
  *reinterpret_cast<uint4*>(to) = words;
}

// sums += hidden up^T, both rounded to T, in slabs of 32 ranks
template <typename T, typename Tile>
__device__ __forceinline__ void add_low_rank(Sums<float, Tile>& sums, const LinearArgs& args, uint8_t* shared,
                                             const Place<Tile>& at) {
  using Kind = Floating<T, Storage::floating>;
  const int first_row = int(blockIdx.x) * Tile::kRows, first_column = int(blockIdx.y) * Tile::kColumns;
  uint8_t* const weight = shared + 64 * Tile::kRows;
#pragma unroll 1
  for (int r = 0; r < args.rank; r += 32) {
    __syncthreads();  // what was there has been read
#pragma unroll 1
    for (int p = threadIdx.x; p < 4 * Tile::kRows; p += Tile::kThreads)
      copy_rounded<T>(shared + 16 * p, args.hidden, first_row + p / 4, args.m, r + 8 * (p % 4), args.rank,
                      args.low_rank_pieces);
#pragma unroll 1
    for (int p = threadIdx.x; p < 4 * Tile::kColumns; p += Tile::kThreads)
      copy_rounded<T>(weight + 64 * weight_slot(p / 4) + 16 * (p % 4), args.up, first_column + p / 4, args.n,
                      r + 8 * (p % 4), args.rank, args.low_rank_pieces);
    __syncthreads();
    multiply_slab<Kind, Tile>(sums, shared, weight, nullptr, at);
  }
}

// The epilogue, eight neighbours of a row at a time in one copy of its code.
template <typename Tile>
__device__ __forceinline__ void finish_tile(const Sums<float, Tile>& sums, const LinearArgs& args,
                                            const Place<Tile>& at) {
  const int first_row = int(blockIdx.x) * Tile::kRows + at.row + at.lane / 4;
  const int first_column = int(blockIdx.y) * Tile::kColumns + at.column + 8 * (at.lane % 4);
  float eights[Tile::kMT * 2 * Tile::kNS][8];
#pragma unroll
  for (int i = 0; i < Tile::kMT; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kNT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        eights[(2 * i + e / 2) * Tile::kNS + j / 4][2 * (j % 4) + e % 2] = sums[i][j][e];
#pragma unroll 1
  for (int u = 0; u < Tile::kMT * 2 * Tile::kNS; ++u) {
    float v[8];
    pick(v, eights, u);
    finish(v, args, first_row + 8 * (u / Tile::kNS), first_column + 32 * (u % Tile::kNS));
  }
}

template <typename Kind, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) linear_mma_kernel(LinearArgs args) {
  uint8_t* const shared = dynamic_shared<uint8_t>();
  const Place<Tile> at;
  Sums<typename Kind::Acc, Tile> sums = {};
  multiply<Kind, Tile>(sums, args, shared, at);

  Sums<float, Tile> scaled;
  const int first_row = int(blockIdx.x) * Tile::kRows + at.row + at.lane / 4;
  const int first_column = int(blockIdx.y) * Tile::kColumns + at.column + 8 * (at.lane % 4);
#pragma unroll
  for (int j = 0; j < Tile::kNT; ++j) {
    float of_column[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      of_column[e] = Kind::kFactor * column_scale<float>(args, first_column + 32 * (j / 4) + 2 * (j % 4) + e);
#pragma unroll
    for (int i = 0; i < Tile::kMT; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) scaled[i][j][e] = float(sums[i][j][e]) * of_column[e % 2];
  }
  if (args.x_scale.data) {
#pragma unroll
    for (int i = 0; i < Tile::kMT; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float of_row = row_scale_of<float>(args, first_row + 16 * i + 8 * h);
#pragma unroll
        for (int j = 0; j < Tile::kNT; ++j) scaled[i][j][2 * h] *= of_row, scaled[i][j][2 * h + 1] *= of_row;
      }
  }
  if (args.rank > 0)
    args.low_rank_bf16 ? add_low_rank<bf16, Tile>(scaled, args, shared, at)
                       : add_low_rank<f16, Tile>(scaled, args, shared, at);
  finish_tile<Tile>(scaled, args, at);
}

template <typename Kind, typename Tile> void launch_mma(cudaStream_t stream, const LinearArgs& args) {
  const auto tiles = [](int n, int tile) { return unsigned((int64_t(n) + tile - 1) / tile); };
  launch("linear", linear_mma_kernel<Kind, Tile>,
         dim3(tiles(args.m, Tile::kRows), tiles(args.n, Tile::kColumns)), dim3(Tile::kThreads),
         Stage<Kind, Tile>::kAll, stream, args);
}

template <typename Kind> void launch_mma(cudaStream_t stream, const LinearArgs& args) {
  switch (choose_tile<typename Kind::Wide>(args.m, args.n, args.processors)) {
    case TileChoice::wide: return launch_mma<Kind, typename Kind::Wide>(stream, args);
    case TileChoice::middle: return launch_mma<Kind, MiddleTile>(stream, args);
    case TileChoice::narrow: return launch_mma<Kind, NarrowTile>(stream, args);
  }
}

}  // namespace rfk
