#pragma once

#include <algorithm>

// What a block of the tensor-core kernels computes: one pure function of the head and of the bytes of an
// element of the two products.

namespace rfk {

inline constexpr int kWarps = 4;
inline constexpr int kBeside =
    2700;  // bytes of a block beside these: numbers of its rows, 1024 of CUDA's own
inline constexpr int kMostShared = 99 << 10;  // of a block on sm_86, 89 and 120

// The head dimension in shared memory and registers, zeros at its end. Products of 16 bits take 16 channels
// at a time, of eight 32.
constexpr int padded_head(int d, int score_bytes) {
  for (int padded : {64, 80, 96, 128})
    if (d <= padded && padded * score_bytes % 32 == 0) return padded;
  return 256;
}

struct AttentionTile {
  int d;       // padded
  int pieces;  // of 16 rows, of a warp
  int keys;    // of a tile of K or V
  int slots;   // of the ring through which tiles of K and of V pass by turns
  // In shared memory: bytes from row to row of Q and K, and of a tile of V; its rows are keys, or channels
  // where codes lie transposed.
  int score_pitch, value_rows, value_pitch;
  int scales;  // where the scales of a tile begin in its slot
  int slot_bytes, q_bytes;

  constexpr int rows() const { return 16 * pieces * kWarps; }
  constexpr int shared() const { return q_bytes + slots * slot_bytes; }
};

// Eight rows of 16 bytes must meet no two banks of shared memory. They are an odd number of 16 bytes apart,
// or close together with their pieces exchanged (piece_of_row), where they have a multiple of 128 bytes.
constexpr int row_pitch(int bytes) { return bytes % 128 ? bytes + 16 : bytes; }

constexpr AttentionTile attention_tile(int head, int score_bytes, int value_bytes, int most_keys) {
  AttentionTile t{};
  t.d = padded_head(head, score_bytes);
  // Two pieces halve the traffic of K and V out of shared memory, which bounds tensor cores as much as
  // their own speed; the sums of 256 channels leave no registers for the second.
  t.pieces = t.d <= 128 ? 2 : 1;
  // Tiles of 32 keys leave registers for the loads of bias and factor, and room for two blocks in 100 KiB.
  // Those of codes are more work for each key, and for the widest heads alone.
  const bool few_keys = value_bytes == 2 ? t.d == 96 || t.d == 128 : t.d == 256;
  t.keys = few_keys ? 32 : most_keys;
  t.score_pitch = row_pitch(t.d * score_bytes);
  t.value_rows = value_bytes == 2 ? t.keys : t.d;
  t.value_pitch = row_pitch(value_bytes == 2 ? 2 * t.d : t.keys);
  t.scales = std::max(t.keys * t.score_pitch, t.value_rows * t.value_pitch);
  t.slot_bytes = t.scales + (score_bytes == 1 ? 4 * std::max(t.keys, t.d) : 0);
  t.q_bytes = t.rows() * t.score_pitch;
  // A third slot where two blocks still share the 100 KiB of a multiprocessor of sm_86.
  t.slots = 2 * (t.q_bytes + 3 * t.slot_bytes + kBeside) <= 100 << 10 ? 3 : 2;
  return t;
}

}  // namespace rfk
