#pragma once

#include "core/dtype.h"
#include "core/tiles.h"

// Softmax of a tile of scores on the CPU, for the keys of one tile, online over tiles.

namespace rfk {

inline constexpr int kMostRows = 12, kPanel = 32;  // rows of a tile; keys of a panel
inline constexpr int kPanels = kWeightKeys / kPanel;
inline constexpr int kRowSlots = 16;  // rows of a tile rounded up to vectors

// What is kept of a row from tile to tile, and what a tile does to the row's sums of values.
template <typename A> struct RowState {
  A top[kRowSlots];      // the largest exponent, base 2; -infinity where no key was seen
  A sum[kRowSlots];      // of the weights, as they are multiplied
  A exact[kRowSlots];    // of the weights before they became integers
  A rescale[kRowSlots];  // of the sums of values before this tile's are added
  A step[kRowSlots];     // of this tile's sums, where weights are integers
};

// Scores of `panels` panels [panels][stride][32], of which the last has `tail` keys. The exponents are
// scores * factor + bias, in base 2; weights 2^(exponent - top), times `relative` where that is given.
// Integer weights are 0 .. 255, relative to the largest exponent of the tile.
template <typename A> struct SoftmaxTile {
  int rows, stride, panels, tail;
  A* scores;
  const A* factor;        // [rows]
  const A* bias;          // [rows or 1][32 panels], base 2, or null
  int64_t bias_stride;    // 0: the same for all rows
  const A* relative;      // of row 0 and the first key of the tile; row i is i entries before; or null
  const int* panel_keys;  // [panels] the first key of each, from the first of the tile on
  void* weights;          // rows of weight_stride(product) words
  RowState<A>* state;
};

// By what the weights become: int8, bf16 or f32.
struct SoftmaxFunctions {
  void (*of[3])(const SoftmaxTile<float>&);
};

extern const SoftmaxFunctions kSoftmaxGeneric;
#ifdef __x86_64__
extern const SoftmaxFunctions kSoftmaxAvx2, kSoftmaxAvx512;
#endif
void softmax_f64(const SoftmaxTile<double>& tile);

}  // namespace rfk
