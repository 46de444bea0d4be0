#ifdef __x86_64__
#include <immintrin.h>

#include "core/tiles.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

// Few bf16 tokens against four-bit weights, bound by the memory that the weights come from.
//
// 128 codes are a vector of 32 words of four. Shifted by 0, 4, 8, 12 bits, the low bits of its words select
// code minus 8 as bf16 from a table in a register: word w of shift j is code 4 w + j, and meets x[4 w + j] in
// tokens that were permuted so. Lane i sums the inputs 8 i .. 8 i + 7, which lie in one group.

namespace rfk {
namespace {

__m512i code_table() {
  alignas(64) uint16_t table[32];
  constexpr uint16_t kSmall[] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080,
                                 0x40a0, 0x40c0, 0x40e0, 0x4100};  // 0 .. 8
  for (int i = 0; i < 32; ++i) {  // the fifth bit of an index is the next code's
    const int code = i % 16 - 8;
    table[i] = code < 0 ? kSmall[-code] | 0x8000 : kSmall[code];
  }
  return _mm512_load_si512(table);
}

// The numbers of the groups that the lanes of block `b` belong to.
struct PerLane {
  int64_t group;
  __m512i index;
  __mmask16 there;

  explicit PerLane(int64_t group) : group(group) {
    alignas(64) int32_t lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = group >= 128 ? 0 : int(8 * i / group);
    index = _mm512_load_si512(lanes);
    there = __mmask16(group >= 128 ? 1 : (1 << (128 / group)) - 1);
  }
  __m512 operator()(const float* row, int64_t b) const {
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(there, row + b * 128 / group));
  }
};

template <int Tokens> void column(const Int4Tile& t, const PerLane& lanes, __m512i table, int column) {
  const uint8_t* const codes = t.codes + column * (t.k / 2);
  __m512 sums[Tokens];
  for (int i = 0; i < Tokens; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t b = 0; b < t.k / 128; ++b) {
    const __m512i block = _mm512_loadu_si512(codes + 64 * b);
    __m512 products[Tokens];
    for (int i = 0; i < Tokens; ++i) products[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i weights = _mm512_permutexvar_epi16(_mm512_srli_epi16(block, 4 * j), table);
#pragma GCC unroll 4
      for (int i = 0; i < Tokens; ++i) {
        const __m512i x = _mm512_loadu_si512(t.x + i * t.k + 128 * b + 32 * j);
        asm("vdpbf16ps %2, %1, %0" : "+v"(products[i]) : "v"(x), "v"(weights));
      }
    }
    const __m512 scale = lanes(t.scale + column * t.groups, b);
#pragma GCC unroll 4
    for (int i = 0; i < Tokens; ++i) sums[i] = _mm512_fmadd_ps(products[i], scale, sums[i]);
    if (!t.zero) continue;
    const __m512 zero = lanes(t.zero + column * t.groups, b);
    for (int i = 0; i < Tokens; ++i)
      sums[i] = _mm512_fmadd_ps(_mm512_loadu_ps(t.inputs + (i * t.k + 128 * b) / 8), zero, sums[i]);
  }
  for (int i = 0; i < Tokens; ++i) t.c[i * t.stride + column] = _mm512_reduce_add_ps(sums[i]);
}

template <int Tokens> void columns(const Int4Tile& t, const PerLane& lanes, __m512i table) {
  for (int i = 0; i < t.columns; ++i) column<Tokens>(t, lanes, table, i);
}

void int4_tile(const Int4Tile& t) {
  const PerLane lanes(t.k / t.groups);
  const __m512i table = code_table();
  switch (t.tokens) {
    case 1: return columns<1>(t, lanes, table);
    case 2: return columns<2>(t, lanes, table);
    case 3: return columns<3>(t, lanes, table);
    default: return columns<4>(t, lanes, table);
  }
}

}  // namespace

const Int4Function kInt4TileAvx512 = int4_tile;

}  // namespace rfk
#endif
