#pragma once

#include <cstdint>
#include <string>

// The inner loop of a product on the CPU: a tile [rows, columns] of sums over k, from panels of words.
//
// A word holds neighbours along k: four int8, two bf16, or one float or double. Panels are interleaved,
// a [steps][rows] words of x, b [steps][columns] words of the weight, so that a step broadcasts words of x
// against vectors of words of the weight. int8 words of x are offset by 128 (what VNNI multiplies is unsigned
// times signed), which the sums of the weight take back afterwards.

namespace rfk {

// What becomes of the sums: c = sums, c += sums, or c (+)= (sums - offset) scale with offset (integers only)
// and scale [columns], where c holds float (double) numbers; by_row: c += sums scale row with row [rows].
enum class Into : uint8_t { set, add, set_scaled, add_scaled, add_scaled_by_row };

struct Scale {
  const int32_t* offset = nullptr;
  const void* scale = nullptr;
  const float* row = nullptr;
};

// A panel of rows, interleaved, or as rows of Stride words.
template <int Rows> struct Interleaved {
  static constexpr int kRows = Rows, kStep = Rows, kRow = 1;
};
template <int Rows, int Stride> struct RowMajor {
  static constexpr int kRows = Rows, kStep = 1, kRow = Stride;
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
constexpr int numbers_of(Product p) {
  return p == Product::int8 ? 4 : p == Product::bf16 ? 2 : 1;
}  // in a word

// Attention: rows of weights for up to 256 keys, in words that are padded against rows in the same sets of
// the cache, times panels of values. Sums are added to c; int8 (weights unsigned, not offset) by row.
enum ValueShape { kValues12x32, kValues12x16, kValues4x32, kValues4x16, kValueShapes };
inline constexpr int kWeightKeys = 256;
constexpr int weight_stride(Product p) { return kWeightKeys / numbers_of(p) + 16; }  // words

// Null where the instruction set has no such function.
struct ProductTiles {
  TileFunction tile[kTileShapes];
  DirectFunction direct[kTileShapes];
  TileFunction values[kValueShapes];
};
enum class VectorSet : uint8_t { generic, avx2, avx512 };
struct Tiles {
  ProductTiles products[4];  // by Product
  Int4Function int4;
  VectorSet vectors;  // for what is beside products

  constexpr ProductTiles& operator[](Product p) { return products[int(p)]; }
  const ProductTiles& operator[](Product p) const { return products[int(p)]; }
  TileFunction of(Product p, TileShape shape) const { return products[int(p)].tile[shape]; }
  DirectFunction direct_of(Product p, TileShape shape) const { return products[int(p)].direct[shape]; }
};

extern const Tiles kTilesGeneric;
#ifdef __x86_64__
extern const Tiles kTilesAvx2, kTilesAvxVnni, kTilesAvx512;
extern const Int4Function kInt4TileAvx512;
#endif

// What this CPU runs: the best product of each kind.
const Tiles& tiles();

// Confines products to an instruction set: generic, avx2, avx_vnni, avx512, avx512_vnni or avx512_bf16.
// Returns whether this CPU has it. For tests.
bool limit_instructions(const std::string& name);

}  // namespace rfk
