#pragma once

#include "linear/epilogue.cuh"
#include "linear/kinds.cuh"

// From global memory to the shared memory of a stage.

namespace rfk {

// A stage of the pipeline: x, then the weight, then what rows of the weight have beside it.
template <typename Kind, typename Tile> struct Stage {
  static constexpr int kX = 64 * Tile::kRows, kWeight = Kind::kWeightBytes * Tile::kColumns;
  static constexpr int kBytes = kX + kWeight + Kind::kRowBytes * Tile::kColumns;
  // The low-rank branch reuses the memory for a slab of 64 bytes on both sides.
  static constexpr int kLowRankBytes = 64 * (Tile::kRows + Tile::kColumns);
  static constexpr int kAll = Tile::kStages * kBytes > kLowRankBytes ? Tile::kStages * kBytes : kLowRankBytes;
  static_assert(kAll <= 48 << 10);
};

// One thread's share of copying pieces of 16 bytes of `Rows` rows, Pieces of each, slab by slab.
template <int Rows, int Pieces, int Threads, int ElementBytes> struct PieceLoader {
  static constexpr int kStep = Threads / Pieces;  // rows between those of a thread
  static constexpr int kCount = (Rows + kStep - 1) / kStep;
  const uint8_t* from;   // its piece of its first row, in the next slab
  int64_t step, left;    // bytes to its next row; bytes from `from` to the end of the row
  int row, piece, rows;  // rows: how many there are from the first of the tile on
  bool whole;            // 16 bytes at a time

  __device__ PieceLoader(const void* data, int64_t stride, int64_t row_bytes, int first, int all, bool whole)
      : row(int(threadIdx.x) / Pieces), piece(int(threadIdx.x) % Pieces), rows(all - first), whole(whole) {
    from = static_cast<const uint8_t*>(data) + (int64_t(first) + row) * stride + 16 * piece;
    step = kStep * stride;
    left = row_bytes - 16 * piece;
  }

  template <typename Place> __device__ void load(uint8_t* stage, Place place) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = row + i * kStep;
      if (Rows % kStep && r >= Rows) break;
      uint8_t* const to = stage + place(r, piece);
      const uint8_t* const source = from + i * step;
      const int64_t count = r < rows ? left : 0;
      if (whole)
        cp_async_zfill<16>(to, source, count > 0);
      else
        copy_elements<ElementBytes>(to, source, count);
    }
    from += 16 * Pieces;
    left -= 16 * Pieces;
  }
};

// What rows of a four-bit weight have beside it, one thread a row: read while a slab is computed, written to
// the stage after it.
template <typename Kind, typename Tile> struct RowLoader {
  static constexpr bool kUsed = Kind::kRowBytes > 0, kInt8 = Kind::kXBytes == 1;
  static constexpr int kSteps = kInt8 ? 2 : 1;  // groups of a slab at most
  static_assert(Tile::kThreads >= Tile::kColumns);
  float scale[kSteps], zero, offset;

  __device__ void fetch(const LinearArgs& args, int first, int slab) {
    if (!kUsed || int(threadIdx.x) >= Tile::kColumns) return;
    const int row = std::min(first + int(threadIdx.x), args.n - 1);
    zero = 8, offset = 0;
#pragma unroll
    for (int h = 0; h < kSteps; ++h) {
      const int input = slab * Kind::kInputs + h * Kind::kInputs / kSteps;
      const int64_t at = int64_t(row) * args.groups + std::min(input / args.group, args.groups - 1);
      scale[h] = args.column_scale ? 1.0f : number_at<float>(args.weight_scale, args.scale_per_row ? at : 0);
      if (kInt8 || !args.weight_zero.data) continue;
      const float given = number_at<float>(args.weight_zero, at);
      (args.weight_zero.dtype == DType::u8 ? zero : offset) = given;
    }
  }

  __device__ void store(uint8_t* stage) const {
    if (!kUsed || int(threadIdx.x) >= Tile::kColumns) return;
    uint8_t* const rows = stage + Stage<Kind, Tile>::kX + Stage<Kind, Tile>::kWeight;
    float* const numbers = reinterpret_cast<float*>(rows) + threadIdx.x;
    if constexpr (kInt8) {  // [step][row]; the products are 16 times those of the codes
      numbers[0] = scale[0] * 0.0625f;
      numbers[Tile::kColumns] = scale[1] * 0.0625f;
    } else if constexpr (kUsed) {
      reinterpret_cast<uint32_t*>(rows)[weight_slot(threadIdx.x)] = minus_zero<typename Kind::Element>(zero);
      numbers[Tile::kColumns] = scale[0];
      numbers[2 * Tile::kColumns] = offset;
    }
  }
};

// The numbers of blocks, two threads a row, in the same two steps.
template <typename Kind, typename Tile> struct BlockLoader {
  static_assert(Tile::kThreads >= 2 * Tile::kColumns);
  Sixteen numbers;

  __device__ void fetch(const LinearArgs& args, int first, int slab) {
    const int row = first + int(threadIdx.x) / 2;
    if (int(threadIdx.x) >= 2 * Tile::kColumns || row >= args.n) return;
    const uint8_t* const blocks = static_cast<const uint8_t*>(args.weight.data) + row * args.weight.stride;
    numbers = sixteen_of(args.gguf, blocks, 2 * slab + int(threadIdx.x) % 2);
  }

  __device__ void store(uint8_t* stage) const {
    if (int(threadIdx.x) >= 2 * Tile::kColumns) return;
    using T = typename Kind::Element;
    float v[16];
    decode_sixteen(numbers, v);
    uint8_t* const to =
        stage + Stage<Kind, Tile>::kX + 64 * weight_slot(threadIdx.x / 2) + 32 * (threadIdx.x % 2);
#pragma unroll
    for (int i = 0; i < 16; i += 8)
      *reinterpret_cast<uint4*>(to + 2 * i) = {pair_of<T>(v[i], v[i + 1]), pair_of<T>(v[i + 2], v[i + 3]),
                                               pair_of<T>(v[i + 4], v[i + 5]),
                                               pair_of<T>(v[i + 6], v[i + 7])};
  }
};

}  // namespace rfk
