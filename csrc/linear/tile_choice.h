#pragma once

#include <algorithm>
#include <cstdint>

// Which tile of the output a block computes: one pure function of the shape and of the device.

namespace rfk {

// A block of kThreads = 32 WM WN threads has WM x WN warps, a warp MT x NS pieces of 16 rows and 32 columns.
template <int MT, int NS, int WM, int WN, int Stages, int Blocks> struct LinearTile {
  static constexpr int kMT = MT, kNS = NS, kNT = 4 * NS;  // kNT: pieces of 8 columns, the n of an mma
  static constexpr int kWarpRows = 16 * MT, kWarpColumns = 32 * NS, kWarpsN = WN;
  static constexpr int kRows = kWarpRows * WM, kColumns = kWarpColumns * WN;
  static constexpr int kThreads = 32 * WM * WN;
  static constexpr int kStages = Stages;  // of the pipeline
  static constexpr int kBlocks = Blocks;  // on a multiprocessor at a time, by registers

  // Clocks that a multiprocessor needs for a slab of 64 bytes: by its tensor cores (2048 products of int8 a
  // clock, as on sm_80), or by its shared memory (128 bytes a clock), whose bytes are what warps read and
  // what copies write.
  static constexpr int kProducts = 64 * kRows * kColumns / 2048;
  static constexpr int kShared = (WM * WN * 64 * (kWarpRows + kWarpColumns) + 64 * (kRows + kColumns)) / 128;
  static constexpr int kClocks = std::max(kProducts, kShared);
};

using WideTile = LinearTile<4, 2, 2, 2, 3, 2>;  // 128 x 128, bound by tensor cores
using HalfWideTile =
    LinearTile<4, 1, 2, 2, 3, 2>;                 // 128 x 64: in place of wide where operands need registers
using MiddleTile = LinearTile<2, 1, 2, 2, 4, 3>;  // 64 x 64
using NarrowTile = LinearTile<1, 1, 4, 1, 6, 5>;  // 64 x 32: few rows or columns, more blocks

enum class TileChoice : uint8_t { wide, middle, narrow };

// Clocks for a slab of [m, n] on `processors` multiprocessors: they take blocks by turns, kBlocks at a time.
// A block that is alone waits about 100 clocks at its barrier and for its loads; others fill them.
template <typename Tile> constexpr int64_t tile_clocks(int64_t m, int64_t n, int processors) {
  constexpr int64_t kAlone = 100;
  const int64_t blocks = (m + Tile::kRows - 1) / Tile::kRows * ((n + Tile::kColumns - 1) / Tile::kColumns);
  const int64_t turns = (blocks + processors - 1) / processors, rest = turns % Tile::kBlocks;
  const auto together = [](int64_t count) { return std::max(count * Tile::kClocks, Tile::kClocks + kAlone); };
  return turns / Tile::kBlocks * together(Tile::kBlocks) + (rest ? together(rest) : 0);
}

// The tile with the fewest; the wider one of equals.
template <typename Wide> constexpr TileChoice choose_tile(int64_t m, int64_t n, int processors) {
  const int64_t wide = tile_clocks<Wide>(m, n, processors),
                middle = tile_clocks<MiddleTile>(m, n, processors),
                narrow = tile_clocks<NarrowTile>(m, n, processors);
  if (wide <= middle && wide <= narrow) return TileChoice::wide;
  return middle <= narrow ? TileChoice::middle : TileChoice::narrow;
}

}  // namespace rfk
