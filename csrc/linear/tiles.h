#pragma once

#include <cstdint>

// The inner loop of a product on the CPU: a tile [rows, columns] of sums over k, from panels of words.
//
// A word holds neighbours along k: four int8, two bf16, or one float or double. Panels are interleaved,
// a [steps][rows] words of x, b [steps][columns] words of the weight, so that a step broadcasts words of x
// against vectors of words of the weight. int8 words of x are offset by 128 (what VNNI multiplies is unsigned
// times signed), which the sums of the weight take back afterwards.

namespace rfk {

// What becomes of the sums: c = sums, c += sums, or c (+)= (sums - offset) scale with offset (integers only)
// and scale [columns], where c holds float (double) numbers.
enum class Into : uint8_t { set, add, set_scaled, add_scaled };

struct Scale {
  const int32_t* offset;
  const void* scale;
};

using TileFunction = void (*)(int64_t steps, const void* a, const void* b, void* c, Into into, Scale scale);

// The same from matrices as they lie in memory, x [rows, k] and w [columns, k] with strides in bytes, for
// products too small to pay for panels. Rows and columns that are not there repeat the last one.
struct Matrix {
  const char* data;
  int64_t stride;
  int count;
  const char* row(int i) const { return data + (i < count ? i : count - 1) * stride; }
};
using DirectFunction = void (*)(int64_t k, Matrix x, Matrix w, void* c, Into into, Scale scale);

// c[tokens, columns] of few bf16 tokens and four-bit weights.
struct Int4Tile {
  int64_t k, groups;
  int tokens, columns;        // at most 4 tokens
  const uint16_t* x;          // [tokens, k] bf16, in blocks of 128: number 4 w + j is at 32 j + w
  const float* inputs;        // [tokens, k / 8] sums of 8 of them
  const uint8_t* codes;       // [columns, k / 2]
  const float *scale, *zero;  // [columns, groups]; W = (code - 8) scale + zero, zero may be null
  float* c;
  int64_t stride;  // of c
};
using Int4Function = void (*)(const Int4Tile& tile);

// The shapes of tiles: twelve rows for products, four for few tokens, 24 for narrow results.
enum TileShape { kTile12x32, kTile4x32, kTile24x16, kTileShapes };
inline constexpr int kTileRows[] = {12, 4, 24}, kTileColumns[] = {32, 32, 16};

enum class Product : uint8_t { int8, bf16, f32, f64 };

// Null where the instruction set has no such product.
struct Tiles {
  TileFunction int8[kTileShapes], bf16[kTileShapes], f32[kTileShapes], f64[kTileShapes];

  DirectFunction direct[3][kTileShapes];  // int8, bf16, f32
  Int4Function int4;

  TileFunction of(Product p, TileShape shape) const {
    const TileFunction* const all[] = {int8, bf16, f32, f64};
    return all[int(p)][shape];
  }
  DirectFunction direct_of(Product p, TileShape shape) const {
    return p == Product::f64 ? nullptr : direct[int(p)][shape];
  }
};

extern const Tiles kTilesGeneric;
#ifdef __x86_64__
extern const Tiles kTilesAvx2, kTilesAvxVnni, kTilesAvx512;
extern const Int4Function kInt4TileAvx512;
#endif

// What this CPU runs: the best product of each kind.
const Tiles& tiles();

}  // namespace rfk
